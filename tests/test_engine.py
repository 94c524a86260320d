"""The engine: the same bits alone and in company, joining and leaving, and every way in which a request can end."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
import torch
from native_runtime import runtime_or_skip

import fastdiff
from fastdiff import Engine
from fastdiff.benchmarks.stub import stub_pipeline
from fastdiff.engine import AsyncEngine, promise
from fastdiff.engine.promise import examine
from fastdiff.engine.ticket import Ticket
from fastdiff.engine.waiting import Waiting
from fastdiff.errors import (
    BackendError,
    Cancelled,
    DeadlineExceeded,
    EngineBusy,
    EngineClosed,
    NotFinite,
    OutOfMemory,
    PlanError,
    ShapeError,
)
from fastdiff.sampling.denoiser import Place
from fastdiff.sampling.solvers import SOLVERS

WAIT = 60.0
MIX = [
    {"sampler": "flow_map", "num_inference_steps": 4, "guidance_scale": 1.0},
    {"sampler": "ddim", "num_inference_steps": 7, "guidance_scale": 2.0, "eta": 0.5},
    {"sampler": "dpmpp_2m", "num_inference_steps": 5, "guidance_scale": 1.5, "guidance": "apg"},
    {"sampler": "ddpm", "num_inference_steps": 6, "guidance_scale": 3.0, "guidance_interval": (0.5, 5.0)},
    {"sampler": "unipc", "num_inference_steps": 6, "guidance_scale": 2.0, "guidance_rescale": 0.5},
    {"sampler": "heun", "num_inference_steps": 3, "clip": 1.0},
]


@pytest.fixture(scope="module")
def pipe():
    return fastdiff.Pipeline.from_pretrained("digits", backend="eager")


@pytest.fixture
def stubbed(monkeypatch):
    """An engine over a stub network; closed at the end."""
    made = []

    def make(max_batch=8, max_queue=64, **options):
        pipe, quick = stub_pipeline()
        engine = Engine(pipe, max_batch=max_batch, max_queue=max_queue)
        for name, value in options.items():
            setattr(quick, name, value)
        quick.batches.clear()
        made.append((engine, quick))
        return engine, quick

    yield make
    for engine, stub in made:
        if stub.gate is not None:
            stub.gate.release(10_000)
        engine.close(drain=False)


# --- same seed, same bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "native", "captured"])
def test_every_image_has_the_bits_it_has_alone(backend):
    if backend == "native":
        runtime_or_skip()
    pipe = fastdiff.Pipeline.from_pretrained("digits", backend=backend)
    with Engine(pipe, max_batch=6) as engine:
        asked = [(i % 10, 100 + i, MIX[i % len(MIX)]) for i in range(18)]
        tickets = [engine.submit(label, seed=seed, **options) for label, seed, options in asked]
        for ticket, (label, seed, options) in zip(tickets, asked, strict=True):
            alone = engine.generate(label, seed=seed, **options)
            assert torch.equal(engine.images(ticket.result(WAIT)), alone), options
    plain = pipe(3, seed=103, output_type="pt", **MIX[3]).images
    assert (plain - engine.images(tickets[3].result())).abs().max() < 1e-5, "and it is the pipeline's image"


def test_every_sampler_is_taken_or_refused_for_its_history(pipe):
    with Engine(pipe, max_batch=4) as engine:
        tickets = {}
        for name in SOLVERS:
            if name == "ddim_inversion":
                continue  # does not start from noise
            steps = {"num_inference_steps": 4}
            try:
                tickets[name] = engine.submit(3, sampler=name, seed=1, **steps)
            except PlanError as why:
                assert "history is 4" in str(why) or "start" in str(why) or "finite" in str(why), (name, why)
        assert len(tickets) > 30
        for name, ticket in tickets.items():
            assert ticket.result(WAIT).isfinite().all(), name


def test_pausing_one_image_or_the_engine_changes_no_bit(pipe):
    with Engine(pipe, max_batch=4) as engine:
        options = {"num_inference_steps": 12, "seed": 5, "sampler": "dpmpp_2m"}
        alone = engine.generate(2, **options)
        ticket, beside = engine.submit(2, **options), engine.submit(4, num_inference_steps=12, seed=6)
        for _ in range(4):
            ticket.pause()
            time.sleep(0.01)
            ticket.resume()
            engine.pause()
            engine.resume()
        assert torch.equal(engine.images(ticket.result(WAIT)), alone)
        beside.result(WAIT)


class Fickle:
    """A network whose images differ in company, as those of some libraries do."""

    def __init__(self, wrong):
        self.wrong, self.calls = wrong, 0

    def gather(self, places):
        return [p.row for p in places]

    def __call__(self, x, row_index, prepared):
        out = 2 * x
        return torch.nextafter(out, out + 1) if self.wrong(x) else out


def test_only_batches_that_keep_their_bits_are_used():
    device, places = torch.device("cpu"), [Place(None, 0, 0)]
    sound = examine(Fickle(lambda x: False), places, (1, 4, 4), 8, device)
    assert sound.widths == (1, 2, 3, 4, 5, 6, 7, 8) and "8 images" in sound.describe()
    some = examine(Fickle(lambda x: len(x) > 4 or len(x) == 3), places, (1, 4, 4), 8, device)
    assert some.widths == (1, 2, 4)
    assert some.cut(7) == [4, 2, 1]
    none = examine(Fickle(lambda x: len(x) > 1), places, (1, 4, 4), 8, device)
    assert none.widths == (1,) and "one image at a time" in none.describe()


def test_what_was_not_examined_in_time_is_not_used(monkeypatch):
    monkeypatch.setattr(promise, "SECONDS", -1.0)
    assert examine(Fickle(lambda x: False), [Place(None, 0, 0)], (1, 4, 4), 8, torch.device("cpu")).widths == (1,)


def test_what_is_slow_once_is_examined_all_the_same(monkeypatch):
    """A backend that compiles, or measures, at the first call of a batch size must not lose its batches for that."""
    monkeypatch.setattr(promise, "SECONDS", 0.04)
    known = set()

    def cold(x):
        if len(x) not in known:
            known.add(len(x))
            time.sleep(0.05)
        return False

    assert examine(Fickle(cold), [Place(None, 0, 0)], (1, 4, 4), 4, torch.device("cpu")).widths == (1, 2, 3, 4)
    known.clear()
    monkeypatch.setattr(promise, "COLD_SECONDS", 0.08)
    assert examine(Fickle(cold), [Place(None, 0, 0)], (1, 4, 4), 4, torch.device("cpu")).widths[-1] < 4


# --- joining and leaving --------------------------------------------------------------------------------------------


def until(condition, seconds=WAIT):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def test_requests_join_a_running_batch(stubbed):
    gate = threading.Semaphore(0)
    engine, stub = stubbed(gate=gate)
    first = engine.submit(1, num_inference_steps=6, seed=0, guidance_scale=1.0)
    until(lambda: stub.batches == [1])
    second = engine.submit(2, num_inference_steps=3, seed=0, guidance_scale=1.0)
    gate.release(100)
    first.result(WAIT), second.result(WAIT)
    assert stub.batches == [1, 2, 2, 2, 1, 1]


def test_cancelling_takes_effect_within_a_step(stubbed):
    gate = threading.Semaphore(0)
    engine, stub = stubbed(gate=gate, max_batch=2)
    running, waiting = (engine.submit(i, num_inference_steps=50, seed=0) for i in (1, 2))
    until(lambda: len(stub.batches) == 1)
    waiting.cancel()
    running.cancel()
    gate.release(1)
    for ticket in (running, waiting):
        with pytest.raises(Cancelled):
            ticket.result(WAIT)
    assert len(stub.batches) == 1
    running.cancel()  # of no consequence


def test_higher_priorities_go_first_and_equals_in_order(stubbed):
    gate = threading.Semaphore(0)
    engine, _ = stubbed(gate=gate, max_batch=2)
    order = []
    tickets = [engine.submit(0, num_inference_steps=1, seed=0, priority=p) for p in (0, 0, 5, 1, 5)]
    for i, ticket in enumerate(tickets):
        ticket.listen(lambda preview, i=i: order.append(i) if preview is None else None)
    gate.release(100)
    for ticket in tickets:
        ticket.result(WAIT)
    assert order in ([0, 2, 4, 3, 1], [2, 4, 3, 0, 1])  # the first may have been taken before the others came


def test_a_full_queue_says_when_to_come_again(stubbed):
    gate = threading.Semaphore(0)
    engine, stub = stubbed(gate=gate, max_batch=2, max_queue=3)
    tickets = [engine.submit(0, num_inference_steps=2, seed=0)]
    until(lambda: len(stub.batches) == 1)
    tickets += [engine.submit(0, num_inference_steps=2, seed=0) for _ in range(3)]
    with pytest.raises(EngineBusy, match="3 images wait already") as busy:
        engine.submit(0, num_inference_steps=2, seed=0)
    assert busy.value.retry_after > 0
    gate.release(100)
    for ticket in tickets:
        ticket.result(WAIT)
    assert engine.stats().answered == {"done": 4}


def test_deadlines_hold_in_the_queue_while_running_and_at_admission(stubbed):
    engine, stub = stubbed(max_batch=2, slow=0.05)
    running = engine.submit(0, num_inference_steps=50, seed=0, timeout=0.3)
    waiting = engine.submit(0, num_inference_steps=50, seed=0, timeout=0.2)
    for ticket in (running, waiting):
        with pytest.raises(DeadlineExceeded, match="is over"):
            ticket.result(WAIT)
    with pytest.raises(DeadlineExceeded, match="not enough time left"):
        engine.submit(0, num_inference_steps=50, seed=0, timeout=1.0).result(WAIT)
    engine.pause()
    with pytest.raises(DeadlineExceeded):
        engine.submit(0, num_inference_steps=1, seed=0, timeout=0.2).result(WAIT)
    engine.resume()
    assert engine.generate(0, num_inference_steps=2, seed=0, timeout=30).isfinite().all()


def test_previews_come_evenly_and_end(stubbed):
    engine, _ = stubbed()
    ticket = engine.submit(0, num_inference_steps=8, seed=0, previews=4)
    seen = list(ticket.seen())
    assert [preview.step for preview in seen] == [2, 4, 6]  # the fourth is the image itself
    assert all(preview.steps == 8 and preview.x.shape == (1, 1, 32, 32) for preview in seen)
    assert list(ticket.seen()) == seen, "who comes late sees them too"


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_not_a_number_fails_one_and_leaves_its_neighbours_bits(stubbed):
    engine, stub = stubbed(nan=7)
    options = {"num_inference_steps": 5, "guidance_scale": 1.0}
    alone = engine.submit(1, seed=3, **options).result(WAIT)
    engine.pause()
    good, bad = engine.submit(1, seed=3, **options), engine.submit(7, seed=4, **options)
    engine.resume()
    with pytest.raises(NotFinite, match="after step 1 of 5"):
        bad.result(WAIT)
    assert torch.equal(good.result(WAIT), alone)


def test_one_that_breaks_the_network_fails_alone(stubbed):
    def fail(labels):
        if (labels == 7).any():
            raise ValueError("seven is not liked")

    engine, _ = stubbed(fail=fail)
    engine.pause()
    tickets = [engine.submit(i, num_inference_steps=3, seed=i) for i in (1, 7, 2)]
    engine.resume()
    with pytest.raises(ValueError, match="seven"):
        tickets[1].result(WAIT)
    assert torch.equal(tickets[0].result(WAIT), engine.submit(1, num_inference_steps=3, seed=1).result(WAIT))
    assert tickets[2].result(WAIT).isfinite().all()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=str)
def test_out_of_memory_fails_one_shrinks_the_batch_and_serves_on(error, stubbed):
    def fail(labels):
        if len(labels) > 2:
            raise error

    engine, stub = stubbed(fail=fail)
    engine.pause()
    options = {"num_inference_steps": 3, "guidance_scale": 1.0}
    tickets = [engine.submit(i, seed=i, **options) for i in range(4)]
    engine.resume()
    outcomes = []
    for ticket in tickets:
        try:
            outcomes.append(ticket.result(WAIT))
        except OutOfMemory as why:
            outcomes.append(str(why))
    assert [type(o) for o in outcomes] == [torch.Tensor, torch.Tensor, str, str]
    stub.batches.clear()
    tickets = [engine.submit(i, seed=i, **options) for i in range(5)]
    for i, ticket in enumerate(tickets[:2]):
        assert torch.equal(ticket.result(WAIT), outcomes[i])
    for ticket in tickets:
        ticket.result(WAIT)
    assert max(stub.batches) <= 2


def test_what_an_engine_does_not_take_is_named(pipe):
    with Engine(pipe, max_batch=2) as engine:
        for options, error, message in (
            ({"generator": torch.Generator(), "seed": None}, PlanError, "from a seed, without mask"),
            ({"num_images_per_prompt": 2}, PlanError, "one image at a time"),
            ({"class_label": 12}, ShapeError, "class label is 12"),
            ({"sampler": "nonsense"}, PlanError, "nonsense"),
            ({"output_type": "pt"}, PlanError, "output_type"),
        ):
            with pytest.raises(error, match=message):
                engine.submit(**{"class_label": 1, "seed": 0, **options})
    with pytest.raises(EngineClosed, match="closed"):
        engine.submit(1, seed=0)
    with pytest.raises(PlanError, match="max_batch is 1"):
        Engine(pipe, max_batch=1)


def test_a_network_that_cannot_be_put_together_is_refused(pipe):
    lonely = fastdiff.Pipeline(pipe.model, object(), pipe.device)
    with pytest.raises(BackendError, match="object cannot run images of different requests"):
        Engine(lonely)


def test_closing_drains_or_fails_what_is_left(stubbed):
    engine, _ = stubbed(slow=0.01)
    tickets = [engine.submit(i, num_inference_steps=3, seed=0) for i in range(6)]
    engine.close()
    assert all(ticket.result(0).isfinite().all() for ticket in tickets)
    engine, stub = stubbed(slow=0.05)
    tickets = [engine.submit(i, num_inference_steps=500, seed=0) for i in range(6)]
    engine.close(timeout=0.2)
    for ticket in tickets:
        with pytest.raises(EngineClosed, match="before the image was finished"):
            ticket.result(0)


def test_a_fault_of_the_engines_own_leaves_nobody_waiting(stubbed, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine, _ = stubbed(slow=0.02)
    ticket = engine.submit(1, num_inference_steps=100, seed=0)
    monkeypatch.setattr(engine, "_turn", lambda _: 1 / 0)
    with pytest.raises(EngineClosed):
        ticket.result(WAIT)
    with pytest.raises(EngineClosed):
        engine.submit(1, seed=0)


def test_a_request_is_answered_once():
    ticket = Ticket()
    ticket.finish(torch.zeros(1))
    with pytest.raises(RuntimeError, match="answered before"):
        ticket.finish(torch.zeros(1))


def test_queues_of_buckets_do_not_wait_for_each_other():
    class Item:
        def __init__(self, rank):
            self.rank = rank

    waiting = Waiting(3)
    items = [Item((0, i)) for i in range(3)]
    waiting.push("a", items[2]), waiting.push("a", items[0]), waiting.push("b", items[1])
    assert waiting.full() and set(waiting.buckets()) == {"a", "b"}
    assert waiting.pop("a") is items[0] and waiting.pop("b") is items[1] and waiting.pop("b") is None
    assert list(waiting.remove(lambda item: item is items[2])) == [items[2]] and len(waiting) == 0


# --- many at once ---------------------------------------------------------------------------------------------------


def test_many_threads_some_of_whom_cancel_are_each_answered_once(stubbed):
    engine, _ = stubbed(max_queue=10_000)
    before, outcomes, lock = threading.active_count(), [], threading.Lock()

    def work(k):
        for i in range(40):
            ticket = engine.submit(i % 10, num_inference_steps=1 + i % 7, seed=i)
            if (i + k) % 3 == 0:
                ticket.cancel()
            try:
                outcome = bool(ticket.result(WAIT).isfinite().all())
            except Cancelled:
                outcome = "cancelled"
            with lock:
                outcomes.append(outcome)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 240 == sum(engine.stats().answered.values())
    assert outcomes.count(True) + outcomes.count("cancelled") == 240
    assert threading.active_count() == before
    stats = engine.stats()
    assert stats.waiting == stats.running == 0
    gc.collect()


def test_asyncio_awaits_images_and_previews_and_cancels_with_the_task(stubbed):
    engine, stub = stubbed(slow=0.002)
    served = AsyncEngine(engine)

    async def main():
        images = await asyncio.gather(*(served.generate(i, num_inference_steps=4, seed=i) for i in range(8)))
        assert len(images) == 8 and all(image.shape == (1, 1, 28, 28) for image in images)
        ticket = await served.submit(1, num_inference_steps=8, seed=0, previews=4)
        assert [preview.step async for preview in served.previews(ticket)] == [2, 4, 6]
        long = asyncio.create_task(served.generate(1, num_inference_steps=900, seed=0))
        await asyncio.sleep(0.05)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        await asyncio.to_thread(until, lambda: engine.stats().answered.get("Cancelled") == 1)
        with pytest.raises(ShapeError):
            await served.generate(99, seed=0)
        await served.close()

    asyncio.run(main())


def test_an_event_loop_that_is_gone_harms_nobody(stubbed):
    gate = threading.Semaphore(0)
    engine, stub = stubbed(gate=gate)

    async def impatient():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(AsyncEngine(engine).generate(1, num_inference_steps=50, seed=0), 0.1)

    asyncio.run(impatient())  # its loop is closed before the engine gets round to answering
    gate.release(10_000)
    assert engine.generate(2, num_inference_steps=3, seed=0, timeout=WAIT).isfinite().all()
    assert engine.stats().answered == {"Cancelled": 1, "done": 1}


def test_a_listener_that_fails_harms_nobody(stubbed, caplog):
    engine, _ = stubbed()
    engine.pause()
    ticket = engine.submit(1, num_inference_steps=4, seed=0, previews=2)
    ticket.listen(lambda preview: 1 / 0)
    engine.resume()
    assert ticket.result(WAIT).isfinite().all()
    assert engine.generate(2, num_inference_steps=3, seed=0).isfinite().all()
    assert "ZeroDivisionError" in caplog.text and "listener" in caplog.text


def test_times_are_told_without_being_asked_for(stubbed):
    told = []
    pipe = fastdiff.Pipeline.from_pretrained("digits", backend="eager")
    with Engine(pipe, max_batch=4, watch=told.append) as engine:
        engine.pause()
        tickets = [engine.submit(i, num_inference_steps=3, seed=i, guidance_scale=1.0) for i in range(2)]
        assert all(ticket.started is None and ticket.ended is None for ticket in tickets)
        time.sleep(0.02)
        engine.resume()
        for ticket in tickets:
            ticket.result(WAIT)
    assert [turn.images for turn in told] == [2, 2, 2] and all(turn.seconds > 0 for turn in told)
    assert [turn.places for turn in told] == [2, 2, 2] and told[0].width == 4
    for ticket in tickets:
        assert ticket.made + 0.02 <= ticket.started < ticket.ended
    assert not engine.accepting()
