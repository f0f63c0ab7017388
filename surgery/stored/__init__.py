"""Tensors in files: the safetensors format, and the bytes of tensors. numpy is not needed.

header     the header of a file, read, checked and written; the dtypes. No torch
blocks     bytes in and out, in little memory. No torch
tensors    tensors from bytes and into bytes, one at a time; their digest
"""
