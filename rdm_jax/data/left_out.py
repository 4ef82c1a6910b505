"""What a set does without: counted by reason, shown, and refused where it is too much."""

import collections
import re
from collections.abc import Iterable, Mapping

from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError

NO_FILE = "has a label in"  # how the reason begins of a labels file's entry without a file


def by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by the reason for which they were left out, the most frequent first; what differs from
    file to file is cut off."""
    found = collections.defaultdict(list)
    for name, reason in skipped.items():
        found[re.sub("[0-9][0-9,.]*", "N", re.split(" ?[(;]", reason)[0])].append(name)
    return dict(sorted(found.items(), key=lambda pair: -len(pair[1])))


def what_of(skipped: Mapping[str, str]) -> str:
    """What is left out: files, or labels as well whose files are not there."""
    return (
        "files and labels"
        if any(reason.startswith(NO_FILE) for reason in skipped.values())
        else "files"
    )


def check_left_out(
    skipped: Mapping[str, str], count: int, lost: Iterable[str], most: float, spec: str
) -> None:
    """Shows what is left out, by reason.

    Args:
      skipped: reasons by name.
      count: of the images that are used.
      lost: classes of which nothing is left.
      most: the share of all that may be left out; 1 for all, and whole classes too.
      spec: of the source.

    Raises:
      InputError: that is more than `most`, or a class is lost.
    """
    if not skipped:
        return
    lost, total = sorted(lost), count + len(skipped)
    too_many = len(skipped) / total > most
    show = log.warning if too_many or lost or 10 * len(skipped) > total else log.info
    counts = (f"{len(skipped):,}", f"{total:,}", what_of(skipped))
    show(
        "data: %s%s of %s %s of %s are left out:",
        "WARNING: " * (show == log.warning),
        *counts,
        spec,
    )
    for reason, names in by_reason(skipped).items():
        show("data:   %s: %s, such as %r", f"{len(names):,}", reason, names[0])
    if lost:
        show("data:   nothing is left of the class %s", ", ".join(map(repr, lost[:10])))
    if most < 1 and (too_many or lost):
        reasons = ", ".join(
            f"{len(names):,} {reason}" for reason, names in list(by_reason(skipped).items())[:3]
        )
        whole = f", and with it the whole class {lost[0]!r}" if lost else ""
        remedy = (
            f"data.max_left_out={_enough(len(skipped), total):g}"
            if not lost
            else "data.max_left_out=1, which allows anything,"
        )
        raise InputError(
            f"{counts[0]} of {counts[1]} {counts[2]} of {spec} would be left out ({reasons}){whole}; {remedy} would do."
        )


def _enough(left_out: int, total: int) -> float:
    """The least share, in whole percent, that allows so many to be left out."""
    return next(percent / 100 for percent in range(1, 101) if left_out / total <= percent / 100)
