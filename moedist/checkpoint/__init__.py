"""State on disk, keyed by global names: written by one world and placement, read by any other."""

from moedist.checkpoint.forms import forms_of
from moedist.checkpoint.retention import mend, set_aside
from moedist.checkpoint.saver import Saver, save_checkpoint
from moedist.checkpoint.store import DamagedCheckpoint, check_index, load_checkpoint, read_meta
from moedist.run_folder import RunFolder, find_run

__all__ = ["DamagedCheckpoint", "RunFolder", "Saver", "check_index", "find_run", "forms_of", "load_checkpoint", "mend",
           "read_meta", "save_checkpoint", "set_aside"]
