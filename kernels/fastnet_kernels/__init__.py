"""Channel-group LSTMs: naive.py is the reference, fused.py the Triton kernels, op.py the operator."""

from .module import ChannelGroupLSTM
from .naive import Stage, Weights, naive
from .op import channel_group_lstm

__all__ = ["ChannelGroupLSTM", "Stage", "Weights", "channel_group_lstm", "naive"]
