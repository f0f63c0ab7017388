// What both ways into the extension need of Python.
#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/object_ptr.h>

namespace {

/// Let the error that Python has raised go through C++, to whoever waits for the result.
[[noreturn]] void pass_on() {
  python_error error;
  error.persist();
  throw std::move(error);
}

}  // namespace
