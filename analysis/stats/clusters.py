"""Which docs are one cluster, as numbers: arrays in, arrays out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Ints = NDArray[np.int64]


def cluster_ids(*labels: Sequence[object] | Ints) -> Ints:
    """Return the number of each doc's cluster: docs that share a label of any kind, directly or
    through others.

    Args:
        *labels: each `[docs]`: conversations, texts of one category, or cluster numbers; `None` is
            shared with no other doc.
    """
    num_docs = len(labels[0])
    rows: list[int] = []
    nodes: list[int] = []
    number_of: dict[tuple[int, object], int] = {}
    for kind, values in enumerate(labels):
        for doc, value in enumerate(values.tolist() if isinstance(values, np.ndarray) else values):
            if value is not None:
                rows.append(doc)
                nodes.append(number_of.setdefault((kind, value), num_docs + len(number_of)))
    size = num_docs + len(number_of)
    graph = sparse.coo_matrix((np.ones(len(rows)), (rows, nodes)), shape=(size, size))
    found = sparse.csgraph.connected_components(graph, directed=False)[1][:num_docs]
    return np.unique(found, return_inverse=True)[1].astype(np.int64)


def renumber(clusters: Ints) -> Ints:
    """Return the clusters of some docs, [docs] or [docs, categories], numbered without gaps."""
    columns = clusters.reshape(len(clusters), -1).T
    return np.stack([np.unique(own, return_inverse=True)[1] for own in columns], axis=1).reshape(
        clusters.shape
    )


def membership(clusters: Ints) -> sparse.csr_matrix:
    """Return [clusters, docs], 1 where the doc is in the cluster."""
    ones, places = np.ones(len(clusters)), np.arange(len(clusters))
    return sparse.csr_matrix((ones, (clusters, places)), (int(clusters.max()) + 1, len(clusters)))


def count_text(numbers: Sequence[int] | Ints, of: str = "clusters") -> str:
    """Return `24 clusters`, or `20 to 24 clusters` where categories differ."""
    least, most = min(numbers), max(numbers)
    return f"{most} {of}" if least == most else f"{least} to {most} {of}"
