"""Training: shardings, the step, the loop, checkpoints, metrics and data."""

from idesign.training.batches import Batches
from idesign.training.batches import in_order
from idesign.training.checkpoint import CheckpointError
from idesign.training.checkpoint import Checkpointer
from idesign.training.data import image_rows
from idesign.training.data import load_files
from idesign.training.data import load_tokenizer
from idesign.training.data import packed_text
from idesign.training.data import padded_text
from idesign.training.loop import fit
from idesign.training.metrics import MetricsWriter
from idesign.training.metrics import read_metrics
from idesign.training.sharding import batch_sharding
from idesign.training.sharding import follow_shardings
from idesign.training.sharding import initialize_distributed
from idesign.training.sharding import make_mesh
from idesign.training.sharding import process_rows
from idesign.training.sharding import shard_batch
from idesign.training.sharding import tree_shardings
from idesign.training.step import init_state
from idesign.training.step import make_train_step
from idesign.training.step import mean_gradient
from idesign.training.step import split_batch
from idesign.training.step import state_shardings
from idesign.training.step import TrainState
from idesign.training.workdir import claim_workdir
