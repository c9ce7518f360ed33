"""What a script in this folder finds as lit_llama: the package beside it, so that it can say what is not installed."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "lit_llama")]

from lit_llama.errors import guard_imports

guard_imports()
