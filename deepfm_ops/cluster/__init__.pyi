from .config import ClusterError as ClusterError
from .server import serve_or_continue as serve_or_continue
