"""This module makes a CLIP tokenizer with a small vocabulary: 256 bytes, 256 word-final bytes, and learnt merges.

Every string can be encoded (byte level), so real captions run through the planted checkpoint as they are.
"""

from __future__ import annotations

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from memscan.planted.captions import vocabulary_corpus

LENGTH = 32
MERGES = 1000


def train_tokenizer(merges: int = MERGES, length: int = LENGTH) -> CLIPTokenizer:
    """Train the tokenizer; deterministic. Vocabulary order is CLIP's: bytes, word-final bytes, merges, start, end."""
    template = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = template.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=512 + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(vocabulary_corpus(), trainer)

    learnt = _merges(learner)[:merges]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    known = set(words)
    for left, right in learnt:
        if left + right not in known:
            known.add(left + right)
            words.append(left + right)
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=learnt, model_max_length=length)  # type: ignore[arg-type]


def _merges(learner: Tokenizer) -> list[tuple[str, str]]:
    import json

    merges = json.loads(learner.to_str())["model"]["merges"]
    return [(pair[0], pair[1]) if isinstance(pair, list) else tuple(pair.split(" ", 1)) for pair in merges]
