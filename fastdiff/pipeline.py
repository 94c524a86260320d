"""``Pipeline``: a model folder in, pictures out, under the names the field already knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.arguments import arguments_of_a_run
from fastdiff.backends import Spec, load_backend
from fastdiff.backends.eager import ops_for
from fastdiff.backends.in_memory import walk_of
from fastdiff.built import BuiltPipeline, BuiltTextToImage, is_built, load_built
from fastdiff.calibration.file import AUTO, Calibrated, load_for, settle
from fastdiff.errors import ArtifactError, PlanError
from fastdiff.images import Output, to_images
from fastdiff.integrations.schedulers import Sampler, from_diffusers_scheduler
from fastdiff.labels import check_labels
from fastdiff.models.files import inside, read_json
from fastdiff.models.weights import MANIFEST, Model, ModelInfo, fingerprint, load_model, load_unet
from fastdiff.sampling.clipping import Clip
from fastdiff.sampling.denoiser import Cond, Network
from fastdiff.sampling.embedded import choose_steps
from fastdiff.sampling.guidance import Rule
from fastdiff.sampling.loop import State
from fastdiff.sampling.parts import Generators
from fastdiff.sampling.path import PATHS
from fastdiff.sampling.path import Path as NoisePath
from fastdiff.sampling.prediction import PREDICTIONS, Prediction
from fastdiff.sampling.run import Planner, Ready, ready, sample
from fastdiff.sampling.solvers import Solver
from fastdiff.sampling.steering import Interval, Strength
from fastdiff.text_to_image import TextToImage, load_folder, load_single_file

BUNDLED = Path(__file__).parent / "bundled"
INDEX = "model_index.json"
UNCONDITIONAL = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
OUTPUTS = ("pil", "pt", "np")


def resolve(model: str | os.PathLike[str]) -> Path:
    """Return the folder of a model: a path, or the name of a bundled one.

    Raises:
        ArtifactError: if it is neither.
    """
    if os.sep not in str(model) and (BUNDLED / str(model)).is_dir() and not Path(model).exists():
        return BUNDLED / str(model)
    if not Path(model).exists():
        names = ", ".join(sorted(entry.name for entry in BUNDLED.iterdir() if entry.is_dir()))
        raise ArtifactError(f"{model}: no such model folder; bundled models: {names}")
    return Path(model)


def _path(artifact: str | os.PathLike[str] | None) -> Path | None:
    return None if artifact is None else Path(artifact)


class Pipeline:
    """A loaded model on one device and backend. It holds no state between calls: threads may share it.

    Args:
        model: network and meaning.
        network: the same network in its backend.
        device: where the loop runs.
        sampler: what to walk with unless a call names another; a diffusers folder brings its scheduler.
    """

    def __init__(self, model: Model, network: Network, device: torch.device, sampler: Sampler | None = None):
        self.model, self.network, self.device, self.sampler = model, network, device, sampler
        self.path: NoisePath
        self.prediction: Prediction
        if sampler is not None:
            self.path, self.prediction = sampler.trained()
        else:
            self.path, self.prediction = PATHS[model.info.path](), PREDICTIONS[model.info.prediction]
        self.guidance_scale = model.info.guidance_scale
        self._calibrated: Calibrated | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        artifact: str | os.PathLike[str] | None = None,
        controlnet: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
        variant: str | None = None,
        allow_pickle: bool = False,
    ) -> Pipeline | TextToImage:
        """Load a model folder, a bundled model by name (``"digits"``), or a folder that diffusers saved.

        Args:
            pretrained: the folder or the name. Text-to-image folders give a ``TextToImage``.
            device: ``"cpu"`` or ``"cuda"``.
            dtype: what the network computes in; the loop itself is float32.
            backend: a name of ``fastdiff.backends.BACKENDS``.
            artifact: the exported file, for backends that run one; by default it is looked for in the folder.
            controlnet: folders of ControlNets, for text-to-image models.
            variant: which of several weights of a diffusers folder, such as ``"fp16"``.
            allow_pickle: read pickled weights of a diffusers folder where there are no safetensors.

        Raises:
            ArtifactError: if the folder or the file is missing, damaged or foreign.
            BackendError: if the backend is unknown or cannot run here.
        """
        folder = resolve(pretrained)
        if is_built(folder):
            raise ArtifactError(f"{folder}: was made by fastdiff build; load it with Pipeline.from_built")
        if (folder / INDEX).exists() and not (folder / MANIFEST).exists():
            return cls._from_index(folder, device, dtype, backend, artifact, controlnet, variant, allow_pickle)
        model = load_model(folder, variant=variant, allow_pickle=allow_pickle)
        for kind, name, table in (
            ("path", model.info.path, PATHS),
            ("prediction", model.info.prediction, PREDICTIONS),
        ):
            if name not in table:
                raise ArtifactError(f"{model.folder}/fastdiff.json: {kind} is {name!r}; allowed: {', '.join(table)}")
        place = torch.device(device)
        network = load_backend(backend, model, Spec(place, dtype, _path(artifact)))
        return cls(model, network, place)

    @classmethod
    def _from_index(
        cls,
        folder: Path,
        device: str | torch.device,
        dtype: torch.dtype,
        backend: str,
        artifact: str | os.PathLike[str] | None,
        controlnet: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        variant: str | None,
        allow_pickle: bool,
    ) -> Pipeline | TextToImage:
        """Load what diffusers saved: an unconditional model, or text to image."""
        name = read_json(inside(folder, INDEX)).get("_class_name")
        how = {"variant": variant, "allow_pickle": allow_pickle}
        if name not in UNCONDITIONAL:
            where = {"device": device, "dtype": dtype, "backend": backend, "artifact": artifact}
            return load_folder(folder, controlnet=controlnet, **where, **how)
        sampler = from_diffusers_scheduler(inside(folder, "scheduler"))
        place = torch.device(device)
        model = Model(load_unet(inside(folder, "unet"), **how), ModelInfo(), folder / "unet")
        return cls(model, load_backend(backend, model, Spec(place, dtype, _path(artifact))), place, sampler)

    @classmethod
    def from_single_file(cls, file: str | os.PathLike[str], **options: Any) -> TextToImage:
        """Load one original checkpoint of Stable Diffusion 1.x, 2.x or XL; see ``fastdiff.text_to_image``."""
        return load_single_file(file, **options)

    @classmethod
    def from_built(cls, folder: str | os.PathLike[str], **options: Any) -> BuiltPipeline | BuiltTextToImage:
        """Load what ``fastdiff build`` made; see ``fastdiff.built.load_built``."""
        return load_built(folder, **options)

    def model_hash(self) -> str:
        """The SHA-256 of the weights, see ``fingerprint``."""
        return fingerprint(self.model.folder) if self.model.folder else ""

    def trained(self) -> tuple[NoisePath, Prediction]:
        """What the network was trained on, and what it predicts."""
        return self.path, self.prediction

    def load_calibration(self, file: str | os.PathLike[str] | None = None, force: bool = False) -> Calibrated:
        """Load what ``sampler="calibrated"`` means; see docs/CALIBRATION.md.

        Args:
            file: what ``fastdiff calibrate`` wrote; by default ``calibration.json`` in the model's folder.
            force: take it even if it was made for other weights.

        Raises:
            ArtifactError: if it is missing, damaged, or made for another network.
        """
        self._calibrated = load_for(self.trained(), self.model_hash(), self.model.folder, file, force)
        return self._calibrated

    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        *,
        num_inference_steps: int | str | None = None,
        tolerance: float | None = None,
        guidance_scale: Strength | Sequence[Strength] | None = None,
        guidance: str | Rule = "cfg",
        guidance_rescale: float = 0.0,
        guidance_interval: Interval | None = None,
        guide: Pipeline | None = None,
        sampler: str | Solver | Planner | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        grid: str | None = None,
        eta: float | None = None,
        gamma: float | None = None,
        clip: Clip | None = None,
        cache_interval: int = 1,
        cache_branch_id: int = 0,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Pipeline, int, float, dict[str, Tensor]], Any] | None = None,
    ) -> Output:
        """Generate images.

        Args:
            class_labels: one label or several; without any, one image of no particular class.
            num_inference_steps: 4 for ``flow_map``, 20 otherwise, unless given. ``"auto"``: the fewest that keep the
                error within ``tolerance``, known beforehand of a calibrated sampler, estimated by a walk of 8 steps
                for ``unipc``.
            tolerance: error to allow ``"auto"``, relative to the image's own size.
            guidance_scale: strength of guidance, a number or a function of time, or one of these for each image; by
                default the model's own, 1 means none.
            guidance: a name of ``GUIDANCES`` or a rule, see docs/GUIDANCE.md.
            guidance_rescale: share of the guided output that is brought back to the conditional one's contrast.
            guidance_interval: noise levels ``sigma / alpha`` between which to guide.
            guide: a weaker model whose estimate takes the place of the unconditional one; it gets the same labels.
            sampler: a name of ``SOLVERS``, what ``from_diffusers_scheduler`` returns, or ``"calibrated"``; by default
                the scheduler that came with the model, ``flow_map`` where the network is one, else ``dpmpp_2m``.
            num_images_per_prompt: images for each label.
            seed: one for the batch (image ``i`` gets ``seed + i``), or one for each image. The same seed gives the
                same image in any batch.
            generator: torch generators instead of seeds, drawn in diffusers' order.
            latents: the starting state instead of noise, ``[B, C, H, W]``.
            timesteps: explicit times, in the network's units.
            sigmas: explicit times, as noise levels.
            grid: a name of ``GRIDS``.
            eta: share of fresh noise of ``ddim`` and ``dpmpp_sde``.
            gamma: share of fresh noise of ``flow_map``.
            clip: bound of the denoised estimate, or a ``DynamicThreshold``.
            cache_interval: step caching, lossy, see docs/GPU.md: run the whole network at every so many evaluations;
                1 means always.
            cache_branch_id: the skip connection above which the network runs at the others; 0 is the shallowest.
            output_type: ``"pil"``, ``"pt"`` (``[B, C, H, W]`` in [0, 1]) or ``"np"`` (``[B, H, W, C]`` in [0, 1]).
            callback_on_step_end: called as ``fn(pipe, i, timestep, {"latents": x})`` after every network evaluation.

        Raises:
            PlanError: on options that do not fit one another.
            ShapeError: on labels, seeds or latents that do not fit the model.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "output_type")}
        callback = given.pop("callback_on_step_end")
        if output_type not in OUTPUTS:
            raise PlanError(f"output_type is {output_type!r}; allowed: {', '.join(OUTPUTS)}")

        def report(i: int, timestep: float, state: State) -> None:
            callback(self, i, timestep, {"latents": state.x})

        tolerance = given["tolerance"]
        options = self._options(**given)
        if options["num_inference_steps"] == AUTO:
            options["num_inference_steps"] = choose_steps(tolerance=tolerance, **options)
        x = sample(
            **options,
            callback=None if callback is None else report,
            ops=ops_for(self.device),
            walk=walk_of(self.network),
        )
        return Output(self.finish(x, output_type))

    def ready(
        self, class_labels: int | Sequence[int] | None = None, *, history: int | None = None, **options: Any
    ) -> Ready:
        """All parts of a call before its first network evaluation, for those who walk by themselves.

        Args:
            class_labels: as of a call.
            history: of ``fastdiff.sampling.run.ready``.
            options: all that a call takes, but for ``output_type`` and ``callback_on_step_end``.

        Raises:
            PlanError: on options that do not fit one another.
            ShapeError: on labels, seeds or latents that do not fit the model.
        """
        given = arguments_of_a_run(self.__call__, class_labels, **options)
        return ready(**self._options(**given), history=history)

    def examples(self, most: int = 3) -> list[int | None]:
        """Class labels to examine the network with."""
        return list(range(min(most, len(self.model.info.classes)))) or [None]

    def finish(self, x: Tensor, output_type: str = "pil") -> Any:
        """What the loop ends with, ``[B, C, H, W]``, as images."""
        return to_images(x, self.model.info.crop, output_type)

    def _options(
        self,
        *,
        class_labels: int | Sequence[int] | None,
        num_images_per_prompt: int,
        num_inference_steps: int | str | None,
        tolerance: float | None,
        sampler: str | Solver | Planner | None,
        guidance_scale: Strength | Sequence[Strength] | None,
        guide: Pipeline | None,
        **others: Any,
    ) -> dict[str, Any]:
        """The arguments of ``fastdiff.sample`` for those of a call."""
        labels = self.labels(class_labels, num_images_per_prompt)
        config, info = self.model.network.config, self.model.info
        if config.sample_size is None:
            raise PlanError("config.json of this model has no sample_size, so it says not how large its images are")
        strength = self.guidance_scale if guidance_scale is None else guidance_scale
        chosen, steps = self.choose(sampler, num_inference_steps, tolerance)
        own = isinstance(chosen, Planner)  # brings path, prediction and times
        if isinstance(chosen, Calibrated):
            chosen.calibration.check_strength(strength)
        weak = None if info.null_label is None or guide is not None else self._cond([info.null_label] * len(labels))
        return {
            "network": self.network,
            "shape": (len(labels), config.in_channels, config.sample_size, config.sample_size),
            "num_inference_steps": steps,
            "sampler": chosen,
            "path": "straight" if own else self.path,
            "prediction": "velocity" if own else self.prediction,
            "cond": self._cond(labels),
            "uncond": weak,
            "guidance_scale": strength,
            "guide": None if guide is None else self._like(guide),
            "device": self.device,
            **others,
        }

    def choose(
        self,
        sampler: str | Solver | Planner | None,
        num_inference_steps: int | str | None,
        tolerance: float | None = None,
    ) -> tuple[str | Solver | Planner, int | str]:
        """Return the sampler and the number of steps of a call, with the model's defaults where None is given."""
        usual = self.sampler or ("flow_map" if self.prediction.two_time else "dpmpp_2m")
        chosen, steps = settle(
            sampler or usual, num_inference_steps, tolerance, lambda: self._calibrated or self.load_calibration()
        )
        return chosen, (4 if chosen == "flow_map" else 20) if steps is None else steps

    def labels(self, class_labels: int | Sequence[int] | None, repeat: int = 1) -> list[int | None]:
        """Check labels and repeat each; ``[None]`` stands for one image of a model without classes.

        Raises:
            ShapeError: naming the first label the model does not know.
        """
        info, labelled = self.model.info, self.model.network.config.num_class_embeds is not None
        return check_labels(class_labels, repeat, len(info.classes), info.null_label, labelled)

    def _like(self, guide: Pipeline) -> Network:
        """Return the network of a model that means the same by its inputs and outputs.

        Raises:
            PlanError: naming the first difference.
        """
        ours, theirs = self.model, guide.model
        for what, mine, other in (
            ("path", ours.info.path, theirs.info.path),
            ("prediction", ours.info.prediction, theirs.info.prediction),
            ("number of classes", ours.network.config.num_class_embeds, theirs.network.config.num_class_embeds),
            ("channels", ours.network.config.in_channels, theirs.network.config.in_channels),
            ("device", self.device, guide.device),
        ):
            if mine != other:
                raise PlanError(f"the guide's {what} is {other!r}; needed: {mine!r}, as in the model it guides")
        return guide.network

    def _cond(self, labels: Sequence[int | None]) -> Cond:
        if self.model.network.config.num_class_embeds is None:
            return Cond()
        return Cond(torch.tensor(labels, dtype=torch.int64, device=self.device))
