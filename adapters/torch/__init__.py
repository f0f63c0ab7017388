"""torch: averaged models leave anchors alone, `torch.save` warns of a state dict with raw keys, and
`torch.load` gives loaders of other libraries that are taught the keys of their model.

Loaded through the entry point `surgery.plugins`. `AveragedModel` goes by the order of parameters and
buffers, and one of the two models may have no anchors: it was copied before surgery.
"""

import torch
from torch.optim.swa_utils import AveragedModel

from surgery.verbs.raw_files import warns_of_raw
from surgery.verbs.savers import gives_keys_taken, pairs_tensors, teach, teach_function

teach(AveragedModel, "update_parameters", pairs_tensors)
teach_function(torch.save, warns_of_raw)
teach_function(torch.load, gives_keys_taken)
