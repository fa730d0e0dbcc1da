"""Channel-group LSTMs: naive.py is the definition, op.py the operator; README.md says what to read in which order."""

from .module import ChannelGroupLSTM
from .naive import Stage, Weights, naive
from .op import channel_group_lstm

__all__ = ["ChannelGroupLSTM", "Stage", "Weights", "channel_group_lstm", "naive"]
