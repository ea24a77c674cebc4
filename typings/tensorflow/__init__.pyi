from typing import Any

def __getattr__(name: str) -> Any: ...  # the real one's hints contradict its use, and reading it takes long
