"""torch: averaged models leave anchors alone.

Loaded through the entry point `surgery.plugins`. `AveragedModel` goes by the order of parameters and
buffers, and one of the two models may have no anchors: it was copied before surgery.
"""

from torch.optim.swa_utils import AveragedModel

from surgery.verbs.savers import pairs_tensors, teach

teach(AveragedModel, "update_parameters", pairs_tensors)
