"""The random world of a family with exact K/V, with a model of what lies in each instance's pool."""

import msgspec
import numpy as np
from scheduler_builders import request
from scheduler_world import World, opening

from dilaserve.engine.prefix_hashes import prefix_hasher
from dilaserve.types import Emit, FamilyTraits, PrefixGrown

PART = 8
STEMS = np.array([[0] * 500, [0] * 64 + [1] * 436, [0] * 40 + [2] * 460, [3] * 500], np.int32)


def some_traits(rng):
    """Of the families that there are, and of others between them."""
    first = rng.random() < 0.5
    return FamilyTraits(
        attention=rng.choice(("block", "causal")),
        grid=rng.choice(("start", "prompt")),
        logit_shift=int(first and rng.random() < 0.5),
        first_token=first,
        part_length=rng.choice((None, PART)),
        steps_per_block=True,
    )


class Canvas:
    """One request as the model of the pools sees it: the tokens of its canvas in the end, and which are final."""

    def __init__(self, wanted, tokens, hasher):
        self.request, self.final, self.hasher = wanted, opening(wanted), hasher
        self.ids, self.tokens = tokens, tokens.astype(np.uint8).tobytes()
        self.exact = [self.right(position) for position in range(wanted.canvas_tokens)]

    def visible(self, position):
        """The end of what K/V of a position depend on."""
        decoding = self.request.decoding
        if decoding.traits.attention == "causal":
            return position + 1
        length = decoding.block_length
        begin = 0 if decoding.traits.grid == "start" else self.request.prompt_tokens
        return min((position - begin) // length * length + length + begin, self.request.canvas_tokens)

    def right(self, position):
        """The exact K/V of a position: all that they depend on."""
        end = self.visible(position)
        begin = 0
        if self.request.decoding.traits.attention == "block":
            begin = (self.request.decoding.block_length, self.visible(0))  # where the blocks before it begin
        return position, begin, self.tokens[:end]


class ExactWorld(World):
    """`pools_kv`: by instance, what is written at each token of its pool."""

    def __init__(self, seed):
        super().__init__(seed)
        self.traits, self.canvases, self.pools_kv = some_traits(self.rng), {}, {}
        self.pools = self.rng.choice(((448,), (480, 448), (576, 448), (2048,)))  # each holds any canvas
        self.copied = self.chunks = 0

    def request(self):
        traits, rng = self.traits, self.rng
        prompt, answer = rng.randint(1, rng.choice((40, 140, 140))), rng.randint(1, rng.choice((40, 300)))
        how = rng.choice((dict(), dict(), dict(rule="dynamic", num_denoising_steps=4)))
        length = rng.choice((4, 8, 32, 24))
        wanted = request(
            self.rows, prompt, answer, self.now, self.slo(), cache="exact", block_length=length, traits=traits, **how
        )
        tokens, hasher = rng.choice(STEMS)[: wanted.canvas_tokens], prefix_hasher(wanted.decoding)
        wanted = self.resumed(wanted)
        hashes = hasher.extend(tokens[: opening(wanted)]) if hasher else ()
        wanted = msgspec.structs.replace(wanted, prefix_hashes=hashes)
        self.canvases[self.rows] = Canvas(wanted, tokens, hasher)
        return wanted

    def observe(self, event):
        """As the engine does: hashes of what has become final are an event behind the one that said so."""
        commands = super().observe(event)
        for command in commands:
            if isinstance(command, Emit) and (hasher := self.canvases[command.request.row].hasher):
                canvas = self.canvases[command.request.row]
                if hashes := hasher.extend(canvas.ids[hasher.position : command.prefix]):
                    commands += super().observe(PrefixGrown(command.request.id, hashes))
        return commands

    def act(self):
        if self.in_flight and self.rng.random() < 0.7:
            self.finish(self.rng.choice(sorted(self.in_flight)))
        else:
            super().act()

    def refreshes(self, span):
        return span.grain > 0

    def launched(self, batch):
        super().launched(batch)
        pool = self.pools_kv.setdefault(batch.instance, [None] * self.instances[batch.instance].kv_tokens)
        for source, target, tokens in batch.copies:
            assert max(source, target) + tokens <= len(pool)
            pool[target : target + tokens] = pool[source : source + tokens]
        self.copied += len(batch.copies)
        runs = self.machine.placement.replicas[batch.instance].pages.runs
        for span, then in zip(batch.spans, batch.then or [()] * len(batch.spans), strict=True):
            for one in (span, *then):
                assert (one.row, one.kv_start) == (span.row, span.kv_start)
                assert one.keys <= runs[span.kv_start]
            self.reads(pool, span)

    def reads(self, pool, span):
        """Its own exact K/V lie before its queries; the queries are those that the logits want, and no more."""
        canvas = self.canvases[span.row]
        there = pool[span.kv_start : span.kv_start + span.start]
        assert there == [*canvas.exact[: span.start]]
        assert span.length > 0
        assert span.keys == span.start + span.length <= canvas.request.canvas_tokens
        assert span.block_start == canvas.final
        if span.block_end > span.block_start:
            assert span.start <= span.block_start - span.shift
            assert span.block_end - span.shift <= span.keys
        else:
            assert span.keys <= span.block_start

    def stepped(self, instance, spans):
        """Queries before the origin see runs that end there and leave exact K/V; those of the open block do not."""
        pool = self.pools_kv[instance]
        for span in spans:
            if f"r{span.row}" not in self.machine.requests:
                continue  # it has ended
            if self.masks.get((span.row, span.block_start)) == 0 and instance in self.begun:
                continue  # it rests
            self.reads(pool, span)
            canvas = self.canvases[span.row]
            for place in range(span.start, span.keys):
                exact = span.grain and place < span.origin
                if exact:
                    end = span.origin - (span.origin - place - 1) // span.grain * span.grain
                    assert end == canvas.visible(place)
                    assert end <= min(canvas.final, span.keys)
                pool[span.kv_start + place] = canvas.exact[place] if exact else ("open", span.row)
            self.chunks += span.block_start == span.block_end

    def reported(self, spans, results):
        for span, result in zip(spans, results, strict=True):
            canvas = self.canvases[span.row]
            if not result.masks_left and canvas.final == span.block_start:
                canvas.final = span.block_end
