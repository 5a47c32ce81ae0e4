"""Text to training batches: sources, tokenizers, a cached corpus of token ids, and packing into sequences."""

from moedist.data.corpus import Corpus, open_corpus, prepare_corpus
from moedist.data.packing import IGNORED, EvalStream, TrainStream
from moedist.data.sources import read_documents, source_splits
from moedist.data.tokenizer import Tokenizer

__all__ = ["IGNORED", "Corpus", "EvalStream", "Tokenizer", "TrainStream", "open_corpus", "prepare_corpus",
           "read_documents", "source_splits"]
