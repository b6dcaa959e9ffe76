"""Models as pure `init` and `apply` functions."""

from idesign.models.functional import DTypePolicy, Model, Params, functional
from idesign.models.mlp import MLPConfig, mlp
