"""Models of Hugging Face's format: read into a run (`import-hf`), upcycled from dense ones, and written (`export-hf`)."""

from moedist.huggingface.export_run import export_run
from moedist.huggingface.import_run import import_run

__all__ = ["export_run", "import_run"]
