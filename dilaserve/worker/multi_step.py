"""What the rows of a launch do in one step after the other, and how far each row has come."""

from collections.abc import Sequence

from dilaserve.types import RowResult, Span


class Courses:
    """`spans`: the first step of each row; `then`: the spans that may follow it, as `types.Batch` tells.

    A row's stage is the place of its present span: 0 in `spans`, n + 1 the n-th of its `then`.
    """

    def __init__(self, spans: Sequence[Span], then: Sequence[Sequence[Span]] = ()) -> None:
        rest = then or [()] * len(spans)
        self.courses = [(span, *others) for span, others in zip(spans, rest, strict=True)]
        self.stages = [0] * len(self.courses)

    @property
    def spans(self) -> list[Span]:
        """What each row does in the next step."""
        return [course[stage] for course, stage in zip(self.courses, self.stages, strict=True)]

    @property
    def repeat(self) -> bool:
        """Whether all rows do the same again while their blocks have masks."""
        return all(self.next_stage(row, masked=True) == stage for row, stage in enumerate(self.stages))

    def follow(self, results: Sequence[RowResult]) -> bool:
        """Take each row from what it has done to what follows; False where a row has nothing left to do."""
        stages = [self.next_stage(row, bool(result.masks_left)) for row, result in enumerate(results)]
        found = [stage for stage in stages if stage is not None]
        if len(found) < len(stages):
            return False
        self.stages = found
        return True

    def next_stage(self, row: int, masked: bool) -> int | None:
        """The next span of the block while it is `masked`, the first of the next block after that."""
        course, stage = self.courses[row], self.stages[row]
        block = course[stage].block_start
        if masked:
            return stage + (stage + 1 < len(course) and course[stage + 1].block_start == block)
        later = range(stage + 1, len(course))
        return next((place for place in later if course[place].block_start != block), None)
