"""ONNX to a plan, for TensorRT (10 and 11) and TensorRT for RTX: strongly typed, so the graph says every precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff.backends.onnx_files import check_external_data
from fastdiff.backends.trt_library import RTX_ARCHITECTURES, TITLES, Library, make_logger
from fastdiff.errors import ArtifactError, BackendError, FastdiffError, PlanError
from fastdiff.export.progress import make_monitor
from fastdiff.models.files import one_line

Bucket = Mapping[str, Sequence[int]]  # dimension, as the graph names it -> (smallest, usual, largest)
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
NO_DRIVER = "graph_jit.cpp"  # in what TensorRT for RTX says where a refittable engine is to be linked without a driver


class BuildCancelled(FastdiffError, RuntimeError):
    """A build that was asked to stop; nothing of it was kept."""


class Recipe(NamedTuple):
    """How to build one engine.

    Args:
        buckets: shapes to be ready for, each one optimisation profile.
        architectures: ``"sm86"``..., TensorRT for RTX only; TensorRT builds for the GPU that is here.
        refit: let weights be changed in the finished engine.
        optimization_level: 0 (built fastest) to 5; None: the library's own.
        workspace_bytes: most scratch memory a layer may take on the GPU; None: the library's own.
    """

    buckets: tuple[Bucket, ...]
    architectures: tuple[str, ...] = ()
    refit: bool = False
    optimization_level: int | None = None
    workspace_bytes: int | None = None


class Built(NamedTuple):
    """A plan and what was read back from the network it was built from."""

    plan: bytes
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    profiles: tuple[Shapes, ...]
    layers: dict[str, int]
    timings: bytes | None  # what tactic timings cost, for the next build; TensorRT for RTX measures none


class Parsed(NamedTuple):
    """A network as the library understood the graph. ``keep`` are objects that must outlive it."""

    network: Any
    builder: Any
    logger: Any
    keep: tuple[Any, ...]


def parse(library: Library, file: Path) -> Parsed:
    """Read an ONNX file into a strongly typed network.

    Raises:
        ArtifactError: naming the first node that the library cannot take, or weights that lie elsewhere.
    """
    check_external_data(file)
    module, logger = library.module, make_logger(library)
    builder = module.Builder(logger)
    typed = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # 11 knows no other networks
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        said = [parser.get_error(i) for i in range(parser.num_errors)]
        where = f"{said[0].node_operator()} {said[0].node_name()!r}: {said[0].desc()}" if said else logger.said()
        raise ArtifactError(f"{file}: {TITLES[library.name]} cannot read it: {one_line(where, 300)}")
    return Parsed(network, builder, logger, (parser,))


def build_plan(
    library: Library,
    file: Path,
    recipe: Recipe,
    *,
    bars: bool = False,
    cancelled: Callable[[], bool] | None = None,
    timings: bytes | None = None,
) -> Built:
    """Build an engine and return it serialised.

    Args:
        library: who builds.
        file: the ONNX graph.
        recipe: how.
        bars: show progress.
        cancelled: asked after every step of the build.
        timings: of an earlier build on this GPU.

    Raises:
        ArtifactError: if the library cannot read the graph or build from it.
        PlanError: if the recipe does not fit the graph or the library.
        BuildCancelled: if ``cancelled`` said so.
    """
    check(recipe, library)
    parsed = parse(library, file)
    allow_decomposition(library, parsed.network)
    config = parsed.builder.create_builder_config()
    profiles = add_profiles(parsed, config, recipe.buckets)
    cache = _configure(library, config, recipe, timings)
    monitor = make_monitor(library, bars=bars, cancelled=cancelled)
    config.progress_monitor = monitor
    plan = _interruptibly(lambda: parsed.builder.build_serialized_network(parsed.network, config), monitor)
    if monitor.failure is not None:
        raise monitor.failure
    if monitor.stopped:
        raise BuildCancelled(f"{file}: the build was cancelled")
    if plan is None:
        raise _refusal(library, file, parsed.logger, recipe)
    inputs, outputs = signature(parsed.network)
    measured = None if cache is None else bytes(memoryview(cache.serialize()))
    return Built(bytes(memoryview(plan)), inputs, outputs, profiles, layers(parsed.network), measured)


def _interruptibly(build: Callable[[], Any], monitor: Any) -> Any:
    """Build in a thread of its own: Ctrl-C reaches the main thread alone, which must not sit in the library."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(build)
        try:
            return running.result()
        except KeyboardInterrupt:
            monitor.stopped = True  # the library asks after its next step
            running.result()
            raise
        finally:
            monitor.close()


def allow_decomposition(library: Library, network: Any) -> None:
    """Let every attention be computed by plain products where the library has no kernel of its own for it.

    A graph that keeps ``Attention`` whole would otherwise fail to build for head sizes and types without one (float32).
    """
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type.name == "ATTENTION_OUTPUT":
            layer.__class__ = library.module.IAttentionOutputLayer
            layer.attention.decomposable = True


def check(recipe: Recipe, library: Library) -> None:
    """Refuse a recipe that no graph can make right.

    Raises:
        PlanError: naming the value and what is allowed.
    """
    if not recipe.buckets:
        raise PlanError("a build needs one bucket of shapes or more")
    level = recipe.optimization_level
    if level is not None and not 0 <= level <= 5:
        raise PlanError(f"optimization_level is {level}; allowed: 0 to 5")
    wanted = recipe.architectures
    if not library.rtx and wanted:
        raise PlanError(f"architectures are {', '.join(wanted)}; TensorRT builds for the GPU that is here: name none")
    if library.rtx:
        strange = next((name for name in wanted if name not in RTX_ARCHITECTURES), None)
        if strange or not wanted:
            raise PlanError(
                f"architectures are {strange or 'not given'}; allowed, for TensorRT for RTX: "
                + ", ".join(RTX_ARCHITECTURES)
            )


def add_profiles(parsed: Parsed, config: Any, buckets: Sequence[Bucket]) -> tuple[Shapes, ...]:
    """Make each bucket an optimisation profile and return the shapes it gave every input.

    Raises:
        PlanError: naming a dimension that the graph lacks, or that the bucket does not bound.
    """
    network = parsed.network
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    named = {tensor.get_dimension_name(i) or "" for tensor in inputs for i, size in enumerate(tensor.shape) if size < 0}
    made = []
    for bucket in buckets:
        for strange in sorted(set(bucket) ^ named):
            wrong, known = "bounds" if strange in bucket else "does not bound", ", ".join(sorted(named)) or "none"
            raise PlanError(f"a bucket {wrong} dimension {strange!r}; the graph's dynamic dimensions: {known}")
        for name, sizes in bucket.items():
            if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                raise PlanError(f"dimension {name!r} is {list(sizes)}; allowed: smallest <= usual <= largest, from 1")
        profile, shapes = parsed.builder.create_optimization_profile(), Shapes()
        for tensor in inputs:
            low, usual, high = (
                tuple(
                    size if size >= 0 else bucket[tensor.get_dimension_name(i)][pick]
                    for i, size in enumerate(tensor.shape)
                )
                for pick in range(3)
            )
            shapes[tensor.name] = (low, usual, high)
            profile.set_shape(tensor.name, low, usual, high)
        if config.add_optimization_profile(profile) < 0:
            raise PlanError(f"bucket {dict(bucket)} is refused: {parsed.logger.said()}")
        made.append(shapes)
    return tuple(made)


def _configure(library: Library, config: Any, recipe: Recipe, timings: bytes | None) -> Any:
    """Set what the recipe asks for; return the timing cache, where the library keeps one."""
    module = library.module
    if recipe.refit:
        config.set_flag(module.BuilderFlag.REFIT)
    if recipe.optimization_level is not None:
        config.builder_optimization_level = recipe.optimization_level
    if recipe.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, recipe.workspace_bytes)
    if library.rtx:
        config.num_compute_capabilities = len(recipe.architectures)
        for i, name in enumerate(recipe.architectures):
            config.set_compute_capability(getattr(module.ComputeCapability, name.upper()), i)
        return None  # it has nothing to time before the engine runs
    cache = config.create_timing_cache(timings or b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _refusal(library: Library, file: Path, logger: Any, recipe: Recipe) -> FastdiffError:
    said = logger.said()
    if recipe.refit and library.rtx and NO_DRIVER in said:
        return BackendError(
            f"{file}: TensorRT for RTX links refittable engines with the CUDA driver, and there is none here: build "
            f"without refit, or on a machine with a GPU ({said})"
        )
    return ArtifactError(f"{file}: {TITLES[library.name]} cannot build it: {said}")


def signature(network: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read inputs and outputs of a network back: name -> [dtype, shape], -1 for a dynamic size."""
    ends = (network.num_inputs, network.get_input), (network.num_outputs, network.get_output)
    inputs, outputs = ({t.name: [t.dtype.name, list(t.shape)] for t in map(get, range(n))} for n, get in ends)
    return inputs, outputs


def layers(network: Any) -> dict[str, int]:
    """Read the layers of a network back: how many of each kind compute in each precision."""
    counts: dict[str, int] = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        name = f"{layer.type.name} {layer.get_output(0).dtype.name}"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
