"""What a set does without: counted by reason, logged, and refused if it is too much."""

import collections
import re
from collections.abc import Iterable, Mapping

from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import BadImage, InputError


def reasons(skipped: Mapping[str, BadImage]) -> dict[str, str]:
    """The reasons alone, by name, as a manifest lists them."""
    return {name: error.reason for name, error in skipped.items()}


def by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """Groups names by their reason, the most frequent one first.

    What differs from file to file (numbers, and what stands in parentheses) is dropped.
    """
    found = collections.defaultdict(list)
    for name, reason in skipped.items():
        found[re.sub("[0-9][0-9,.]*", "N", reason.partition(" (")[0])].append(name)
    return dict(sorted(found.items(), key=lambda pair: -len(pair[1])))


def check_left_out(
    skipped: Mapping[str, str], count: int, lost: Iterable[str], most: float, spec: str
) -> None:
    """Logs what is left out, by reason.

    Args:
      skipped: reasons by name.
      count: number of images that are used.
      lost: classes of which no image is left.
      most: the largest share of entries that may be left out; 1 allows everything, whole classes
        included.
      spec: of the source.

    Raises:
      InputError: the share exceeds `most`, or a class is lost.
    """
    if not skipped:
        return
    lost, total = sorted(lost), count + len(skipped)
    too_many = len(skipped) / total > most
    is_grave = too_many or lost or 10 * len(skipped) > total
    show = log.warning if is_grave else log.info
    show(
        "data: %s%s of %s entries of %s are left out:",
        "WARNING: " if is_grave else "",
        f"{len(skipped):,}",
        f"{total:,}",
        spec,
    )
    grouped = by_reason(skipped)
    for reason, names in grouped.items():
        show("data:   %s: %s, such as %r", f"{len(names):,}", reason, names[0])
    if lost:
        show("data:   no image is left of the class %s", ", ".join(map(repr, lost[:10])))
    if most < 1 and (too_many or lost):
        counts = ", ".join(f"{len(names):,} {reason}" for reason, names in [*grouped.items()][:3])
        classes = f", and with them the whole class {lost[0]!r}" if lost else ""
        fix = (
            "Set data.max_left_out=1, which allows any loss."
            if lost
            else f"Set data.max_left_out={_least_share(len(skipped), total):g}."
        )
        raise InputError(
            f"{len(skipped):,} of {total:,} entries of {spec} are unusable ({counts}){classes}", fix
        )


def _least_share(left_out: int, total: int) -> float:
    """The smallest share, in whole percent, that allows so many to be left out."""
    return next(percent / 100 for percent in range(1, 101) if left_out / total <= percent / 100)
