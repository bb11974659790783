"""Finding texts that say the same: exactly (but for case, spaces and punctuation) and nearly."""

import hashlib
import math
from collections import defaultdict

import numpy as np
from tqdm import tqdm

from dataset.read_raw import RAW_CUT, Document, Removed
from dataset.text import fold, words

SHINGLE = 3  # words
NEAR = 0.8  # Jaccard similarity from which two texts are near duplicates
_EPSILON = 1e-9  # 0.8 * 5 must not round up to more than 4


def drop_duplicates(documents: list[Document], near: float = NEAR) -> tuple[list[Document], list[Removed]]:
    """Keep the first of texts that are the same but for case, spaces and punctuation, or nearly the same.

    The same text under different labels is dropped altogether: nobody can say which label is right.

    Args:
        near: Jaccard similarity of three-word shingles from which texts are near duplicates; above 1 keeps them.
    """
    same_text = defaultdict(list)
    for document in documents:
        same_text[fold(document.text)].append(document)
    unique, dropped = [], []
    for first, *others in same_text.values():
        conflict = any(other.label != first.label for other in others)
        if conflict:
            dropped.append(_removed(first, "same text under different labels", others[0]))
        else:
            unique.append(first)
        reason = "same text under different labels" if conflict else "exact duplicate"
        dropped += [_removed(other, reason, first) for other in others]

    twins = find_near_duplicates([document.text for document in unique], near) if near <= 1 else [None] * len(unique)
    kept = []
    for document, twin in zip(unique, twins, strict=True):
        if twin is None:
            kept.append(document)
        else:
            other_label = document.label != unique[twin].label
            reason = "near duplicate under another label" if other_label else "near duplicate"
            dropped.append(_removed(document, reason, unique[twin]))
    return kept, sorted(dropped, key=lambda row: row.line)


def _removed(document: Document, reason: str, twin: Document) -> Removed:
    return Removed(document.line, reason, document.text[:RAW_CUT], twin.line)


def find_near_duplicates(texts: list[str], threshold: float = NEAR) -> list[int | None]:
    """For each text the earlier text that it nearly repeats, or None for a text that stays.

    Two texts are near duplicates where the Jaccard similarity of their sets of three-word shingles reaches the
    threshold. The answer is exact, not sampled: no two texts that stay are near duplicates.

    Two sets that are that similar must share one of their rarest shingles (prefix filtering: Bayardo, Ma, Srikant,
    "Scaling up all pairs similarity search", WWW 2007). So an index of only those finds every candidate, and its
    lists stay short because they are lists of rare shingles.
    """
    shingle_sets = _rank_by_rarity([_shingles(text) for text in tqdm(texts, "shingles", delay=1, leave=False)])
    index: dict[int, list[int]] = defaultdict(list)
    twins: list[int | None] = []
    for number, shingles in enumerate(tqdm(shingle_sets, "near duplicates", delay=1, leave=False)):
        rare = shingles[: len(shingles) - math.ceil(threshold * len(shingles) - _EPSILON) + 1].tolist()
        candidates = sorted({other for shingle in rare for other in index.get(shingle, ())})
        twin = next((o for o in candidates if _similar(shingles, shingle_sets[o], threshold)), None)
        twins.append(twin)
        if twin is None:
            for shingle in rare:
                index[shingle].append(number)
    return twins


def _similar(a: np.ndarray, b: np.ndarray, threshold: float) -> bool:
    """Whether the Jaccard similarity of two sorted sets reaches the threshold."""
    if min(len(a), len(b)) < threshold * max(len(a), len(b)) - _EPSILON:
        return False
    common = np.intersect1d(a, b, assume_unique=True).size
    return common >= threshold * (len(a) + len(b) - common) - _EPSILON


def _shingles(text: str) -> np.ndarray:
    """The set of a text's three-word shingles as sorted 64-bit hashes (the same in every run)."""
    found = words(text.casefold()) or [text]
    runs = {" ".join(found[i : i + SHINGLE]) for i in range(max(1, len(found) - SHINGLE + 1))}
    digests = b"".join(hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs)
    return np.sort(np.frombuffer(digests, dtype="<u8"))


def _rank_by_rarity(hash_sets: list[np.ndarray]) -> list[np.ndarray]:
    """The same sets with each hash replaced by its rank, the rarest of all texts first; each set sorted."""
    if not hash_sets:
        return []
    hashes, counts = np.unique(np.concatenate(hash_sets), return_counts=True)
    ranks = np.empty(len(hashes), dtype=np.int64)
    ranks[np.lexsort((hashes, counts))] = np.arange(len(hashes))
    return [np.sort(ranks[np.searchsorted(hashes, hash_set)]) for hash_set in hash_sets]
