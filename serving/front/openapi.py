"""stub"""
from typing import Any
def document(served: Any, app: Any) -> dict[str, Any]: return {}
