from .checkpoints import Checkpoint as Checkpoint
from .config import ClusterError as ClusterError
from .initializers import RowNormal as RowNormal
from .model import ShardedDeepFM as ShardedDeepFM
from .server import serve_or_continue as serve_or_continue
