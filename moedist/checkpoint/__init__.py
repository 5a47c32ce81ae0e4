"""State on disk, keyed by global names: written by one world and placement, read by any other."""

from moedist.checkpoint.forms import forms_of
from moedist.checkpoint.run_folder import RunFolder, find_run
from moedist.checkpoint.store import load_checkpoint, read_meta, save_checkpoint

__all__ = ["RunFolder", "find_run", "forms_of", "load_checkpoint", "read_meta", "save_checkpoint"]
