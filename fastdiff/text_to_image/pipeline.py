"""Stable Diffusion 1, 2 and XL from published files: text to image, image to image, inpainting, ControlNet, LoRA.

The names of all arguments are those of diffusers' pipelines, and so is the order in which noise is drawn from a
``generator``: with the same one, and the scheduler of the folder, the picture is the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.arguments import Prompt, arguments_of_a_run, listed
from fastdiff.backends.eager import checked_device, ops_for
from fastdiff.backends.in_memory import network_of, walk_of
from fastdiff.calibration.file import AUTO, Calibrated, load_for, settle
from fastdiff.errors import PlanError
from fastdiff.images import OUTPUTS, Output, Picture, fitting_size, to_images, to_tensor
from fastdiff.models.autoencoder import wide
from fastdiff.models.lora import LoraSet, read_lora
from fastdiff.models.text import Encoded, encode
from fastdiff.models.weights import fingerprint, weights_hash
from fastdiff.sampling.embedded import choose_steps
from fastdiff.sampling.loop import State
from fastdiff.sampling.parts import Generators
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import Prediction
from fastdiff.sampling.run import Planner, Ready, ready, sample
from fastdiff.sampling.solvers import Solver
from fastdiff.text_to_image.conditioning import Conditioning, controlled
from fastdiff.text_to_image.offload import Offload
from fastdiff.text_to_image.parts import Parts, usual_strength
from fastdiff.text_to_image.start import Draws, start

DEFAULT_STEPS = 50


class TextToImage:
    """A loaded text-to-image model. Calls hold no state; LoRA weights are merged into the networks and stay there.

    Args:
        parts: the networks.
        device: where they are.
        backend: of ``fastdiff.backends.in_memory.network_of``.
        exported: the UNet in another runtime, which then runs instead.
    """

    def __init__(self, parts: Parts, device: torch.device, backend: str = "auto", exported: Any = None):
        self.parts, self.device = parts, device
        self.network = exported or network_of(parts.unet, backend)
        self._backend, self._exported = backend, exported is not None
        self._offload: Offload | None = None
        self._tile: int | None = None
        named = {} if exported else {"unet": parts.unet}
        for i, encoder in enumerate(parts.text_encoders):
            named["text_encoder" if i == 0 else f"text_encoder_{i + 1}"] = encoder.model
        self._loras = LoraSet(named)
        self._calibrated: Calibrated | None = None

    @property
    def guidance_scale(self) -> float:
        """The strength of guidance unless a call names another: diffusers' defaults."""
        return usual_strength(self.parts.xl)

    # --- calibration ------------------------------------------------------------------------------------------------

    def trained(self) -> tuple[Path, Prediction]:
        """What the network was trained on, and what it predicts."""
        return self.parts.sampler.trained()

    def model_hash(self) -> str:
        """The SHA-256 of the UNet's weights: of its file, whatever they are converted to and whichever adapters run;
        of the tensors as they are where the model came from no folder.
        """
        parts = self.parts
        return weights_hash(parts.unet) if parts.folder is None else fingerprint(parts.folder / "unet", parts.variant)

    def load_calibration(self, file: str | os.PathLike[str] | None = None, force: bool = False) -> Calibrated:
        """Load what ``sampler="calibrated"`` means; see docs/CALIBRATION.md.

        Args:
            file: what ``fastdiff calibrate`` wrote; by default ``calibration.json`` in the model's folder.
            force: take it even if it was made for other weights.

        Raises:
            ArtifactError: if it is missing, damaged, or made for another network.
        """
        self._calibrated = load_for(self.trained(), self.model_hash(), self.parts.folder, file, force)
        return self._calibrated

    def choose(
        self,
        sampler: str | Solver | Planner | None,
        num_inference_steps: int | str | None,
        tolerance: float | None = None,
    ) -> tuple[str | Solver | Planner, int | str]:
        """Return the sampler and the number of steps of a call, with the model's defaults where None is given."""
        chosen, steps = settle(
            sampler or self.parts.sampler, num_inference_steps, tolerance,
            lambda: self._calibrated or self.load_calibration(),
        )  # fmt: skip
        return chosen, DEFAULT_STEPS if steps is None else steps

    # --- memory -----------------------------------------------------------------------------------------------------

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Keep the networks in the host's memory, and on ``device`` only while they run.

        Text encoders, the UNet with its ControlNets, and the autoencoder take turns: the device holds the largest of
        them and what it computes with. Calls of several threads take turns too. Load the model with ``device="cpu"``,
        so that it is never there as a whole. Not while a call runs.

        A graph would be captured anew in every call, since weights never lie where they lay: backend ``"auto"`` means
        ``"eager"`` now.

        Raises:
            BackendError: if the device is not there.
            PlanError: if the UNet was exported: another runtime holds its weights.
        """
        if self._exported:
            raise PlanError("an exported UNet cannot be offloaded: another runtime holds its weights")
        parts, place = self.parts, checked_device(device)
        ops = ops_for(place)
        for network in (parts.unet, parts.vae, *parts.controlnets, *(encoder.model for encoder in parts.text_encoders)):
            network.to("cpu")
        for network in (parts.unet, *parts.controlnets):
            network.ops = ops
        parts.vae.ops = wide(ops)
        self.device, self._offload = place, Offload(place)
        self.network = network_of(parts.unet, "eager" if self._backend == "auto" else self._backend, place)

    def enable_vae_tiling(self, tile: int = 64) -> None:
        """Decode in tiles of so many latents, with less memory; see docs/MODELS.md for what that changes.

        Raises:
            PlanError: if a tile is not larger than the overlap of tiles.
        """
        least = self.parts.vae.overlap + 1
        if isinstance(tile, bool) or not isinstance(tile, int) or tile < least:
            raise PlanError(f"tile is {tile!r}; allowed for this autoencoder: whole numbers from {least}")
        self._tile = tile

    def disable_vae_tiling(self) -> None:
        """Decode in one piece again."""
        self._tile = None

    def _using(self, *networks: nn.Module) -> AbstractContextManager[None]:
        """Where these networks may run."""
        return nullcontext() if self._offload is None else self._offload(*networks)

    # --- LoRA -------------------------------------------------------------------------------------------------------

    def load_lora_weights(self, file: str | os.PathLike[str], adapter_name: str = "default") -> None:
        """Load a LoRA file (kohya's or diffusers' layout) and merge it with strength 1, beside those loaded before.

        Not while a call runs. The weights keep their addresses.

        Raises:
            ArtifactError: naming the first tensor that does not fit; nothing has changed then. An exported UNet takes
                no adapter: it is exported with one merged.
        """
        self._loras.load(adapter_name, read_lora(file))
        self._loras.set(self._loras.active | {adapter_name: 1.0})

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Merge these adapters with these strengths, and no others."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = [adapter_weights] * len(names) if isinstance(adapter_weights, int | float) else list(adapter_weights)
        if len(names) != len(weights):
            raise PlanError(f"{len(weights)} adapter_weights for {len(names)} adapters; allowed: one for each")
        self._loras.set(dict(zip(names, weights, strict=True)))

    def unload_lora_weights(self) -> None:
        """Take all adapters out; the weights are what they were, bit for bit."""
        self._loras.clear()

    # --- prompts ----------------------------------------------------------------------------------------------------

    def encode_prompt(self, prompt: Prompt, prompt_2: Prompt | None = None, clip_skip: int | None = None) -> Encoded:
        """Encode prompts as a call does, to weight or keep them: ``prompt_embeds`` and ``pooled_prompt_embeds``."""
        texts = listed(prompt)
        encoders = self.parts.text_encoders
        prompts = [texts, listed(prompt_2 or prompt)][: len(encoders)]
        with self._using(*(encoder.model for encoder in encoders)):
            return encode(encoders, prompts, clip_skip, self.parts.xl)

    # --- the call ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | None = None,
        prompt_2: Prompt | None = None,
        *,
        image: Picture | Sequence[Picture] | None = None,
        mask_image: Picture | Sequence[Picture] | None = None,
        control_image: Picture | Sequence[Picture] | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float | None = None,
        num_inference_steps: int | str | None = None,
        tolerance: float | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        negative_prompt: Prompt | None = None,
        negative_prompt_2: Prompt | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        seed: int | Sequence[int] | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        sampler: Planner | str | Solver | None = None,
        cache_interval: int = 1,
        cache_branch_id: int = 0,
        callback_on_step_end: Callable[[TextToImage, int, float, dict[str, Tensor]], Any] | None = None,
    ) -> Output:
        """Generate pictures.

        Args:
            prompt: what to show; one text, or one for each image.
            prompt_2: for the second text encoder of SDXL; ``prompt`` unless given.
            image: pictures to start from (image to image), or to paint into.
            mask_image: where to paint: white, or 1. Networks of nine channels read it; others are held to the picture.
            control_image: what the ControlNet is shown; a list has one entry for each of several ControlNets.
            height: of the result, a multiple of 8; the model's own, or that of ``image``, unless given.
            width: likewise.
            strength: how much of ``image`` is made anew: 0.8 unless given, SDXL 0.3; with a mask 1, SDXL 0.9999.
            num_inference_steps: as the scheduler counts them, 50 unless given. ``"auto"``: the fewest that keep the
                error within ``tolerance``, known beforehand of a calibrated sampler, estimated by a walk of 8 steps
                for ``unipc``.
            tolerance: error to allow ``"auto"``, relative to the latents' own size.
            timesteps: in the scheduler's own units, where it takes them.
            sigmas: likewise.
            guidance_scale: 7.5 unless given, SDXL 5; 1 means none. An LCM takes it as an input.
            guidance_rescale: share of the guided output that is brought back to the conditional one's contrast.
            negative_prompt: what not to show.
            negative_prompt_2: for the second text encoder.
            num_images_per_prompt: images for each prompt.
            eta: DDIM's share of fresh noise.
            seed: one for the batch, or one for each image: the same image in any batch.
            generator: torch generators instead, drawn in diffusers' order.
            latents: the starting noise, ``[B, C, H/8, W/8]``, of variance 1.
            prompt_embeds: instead of ``prompt``, ``[B, L, E]``; weighted prompts come this way.
            negative_prompt_embeds: instead of ``negative_prompt``.
            pooled_prompt_embeds: SDXL's, ``[B, E']``.
            negative_pooled_prompt_embeds: likewise.
            output_type: ``"pil"``, ``"np"``, ``"pt"``, or ``"latent"``.
            original_size: SDXL's; height and width unless given.
            crops_coords_top_left: SDXL's.
            target_size: SDXL's; height and width unless given.
            negative_original_size: with ``negative_target_size``: SDXL's sizes of what is guided away from.
            negative_crops_coords_top_left: likewise.
            negative_target_size: likewise.
            clip_skip: layers of the text encoder to leave out at its end.
            controlnet_conditioning_scale: strength of the ControlNet, or one for each.
            control_guidance_start: share of the steps before which it does nothing.
            control_guidance_end: share of the steps after which it does nothing.
            sampler: what to walk with, in place of the model's scheduler: a name of ``SOLVERS``, a solver, what
                ``from_diffusers_scheduler`` returns, or ``"calibrated"``.
            cache_interval: step caching, lossy, see docs/GPU.md: run the whole network at every so many evaluations;
                1 means always.
            cache_branch_id: the skip connection above which the network runs at the others; 0 is the shallowest.
            callback_on_step_end: called as ``fn(pipe, i, timestep, {"latents": x})`` after every network evaluation.

        Raises:
            PlanError: on options that do not fit one another or this model.
            ShapeError: on pictures, sizes, latents or seeds that do not fit.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "output_type")}
        callback = given.pop("callback_on_step_end")
        if output_type not in OUTPUTS:
            raise PlanError(f"output_type is {output_type!r}; allowed: {', '.join(OUTPUTS)}")

        def report(i: int, timestep: float, state: State) -> None:
            callback(self, i, timestep, {"latents": state.x})

        options = self._options(SimpleNamespace(**given))
        with self._using(self.parts.unet, *self.parts.controlnets):
            if options["num_inference_steps"] == AUTO:
                options["num_inference_steps"] = choose_steps(tolerance=tolerance, **options)
            x = sample(
                **options,
                callback=None if callback is None else report,
                ops=ops_for(self.device),
                walk=walk_of(options["network"]),
            )
            if self._offload is not None:
                self.network.forget()  # what was captured reads weights that go now
        return Output(self.finish(x, output_type))

    @torch.no_grad()
    def ready(self, prompt: Prompt | None = None, *, history: int | None = None, **options: Any) -> Ready:
        """All parts of a call before its first network evaluation, for those who walk by themselves.

        Args:
            prompt: as of a call.
            history: of ``fastdiff.sampling.run.ready``.
            options: all that a call takes, but for ``output_type`` and ``callback_on_step_end``.

        Raises:
            PlanError: on options that do not fit one another or this model, and if the networks are offloaded.
            ShapeError: on pictures, sizes, latents or seeds that do not fit.
        """
        if self._offload is not None:
            raise PlanError("networks that are offloaded cannot be walked from outside: they are here within a call")
        given = arguments_of_a_run(self.__call__, prompt, **options)
        return ready(**self._options(SimpleNamespace(**given)), history=history)

    @torch.no_grad()
    def finish(self, x: Tensor, output_type: str = "pil") -> Any:
        """What the loop ends with, ``[B, C, h, w]``, as images."""
        return x if output_type == "latent" else to_images(self.decode(x), 0, output_type)

    def _options(self, asked: SimpleNamespace) -> dict[str, Any]:
        """The arguments of ``fastdiff.sample`` for those of a call."""
        if asked.seed is not None and asked.generator is not None:
            raise PlanError("give seed or generator, not both")
        parts, config = self.parts, self.parts.unet.config
        scale = self.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
        source, count = self.choose(asked.sampler, asked.num_inference_steps, asked.tolerance)
        if isinstance(source, Calibrated):
            source.calibration.check_strength(scale)
        guided = scale > 1 and config.time_cond_proj_dim is None
        size = self.size(asked.height, asked.width, asked.image)
        words = Conditioning(parts, self.encode_prompt, self.network.dtype, self.device)
        cond, uncond = words.of(asked, size, scale, guided)
        batch = len(cond.extra["encoder_hidden_states"])
        network: Any = self.network
        if parts.controlnets or asked.control_image is not None:
            network = controlled(network, parts, asked, size, batch)
        draws = Draws(asked.seed, asked.generator, batch, self.device)
        if asked.image is None and asked.strength is not None:
            raise PlanError(f"strength is {asked.strength!r} without a picture to start from: give image")
        strength = self._strength(asked.strength, asked.image, asked.mask_image)
        with nullcontext() if asked.image is None else self._using(parts.vae):
            given = start(
                parts.vae, asked.image, asked.mask_image, size, strength, asked.latents, draws,
                reads_mask=config.in_channels > parts.vae.latent_channels,
            )  # fmt: skip
        if given.concat is not None:
            cond, uncond = (
                part and part._replace(extra={**(part.extra or {}), "concat": given.concat}) for part in (cond, uncond)
            )
        noise = given.noise
        if noise is not None and given.image is None and isinstance(source, Planner):
            own = {"timesteps": asked.timesteps, "sigmas": asked.sigmas}
            steps = None if asked.timesteps or asked.sigmas else count
            noise = noise * source.plan(steps, **own, eta=asked.eta).initial_scale

        walk: dict[str, Any] = {"sampler": source}
        if not isinstance(source, Planner):
            walk["path"], walk["prediction"] = parts.sampler.trained()
        return dict(
            network=network,
            shape=(batch, parts.vae.latent_channels, *self._latent(size)),
            num_inference_steps=count,
            **walk,
            cond=cond,
            uncond=uncond,
            guidance_scale=scale if guided else 1.0,
            guidance_rescale=asked.guidance_rescale,
            timesteps=asked.timesteps,
            sigmas=asked.sigmas,
            eta=asked.eta,
            seed=draws.seeds,
            generator=asked.generator,
            latents=noise,
            image=given.image,
            mask_image=given.mask,
            keep="noise",
            strength=given.strength,
            cache_interval=asked.cache_interval,
            cache_branch_id=asked.cache_branch_id,
            device=self.device,
        )

    def examples(self, most: int = 2) -> list[str]:
        """Prompts to examine the network with."""
        return ["", "a picture"][:most]

    def decode(self, latents: Tensor) -> Tensor:
        """``[B, C, h, w]`` as the loop leaves them -> images ``[B, 3, H, W]``, about [-1, 1]."""
        vae = self.parts.vae
        with self._using(vae):
            return vae.to_images(latents.to(self.device, next(vae.parameters()).dtype), self._tile).float()

    def size(self, height: int | None, width: int | None, image: Any = None) -> tuple[int, int]:
        """Height and width of the result, where some may be left out; see a call.

        Raises:
            ShapeError: if the model cannot draw them.
        """
        factor = self.parts.vae.shrink
        if image is not None and height is None and width is None:
            return tuple(to_tensor("image", image, None, factor).shape[2:])  # type: ignore[return-value]
        own = (self.parts.unet.config.sample_size or 64) * factor
        return fitting_size((height, width), (own, own), factor)

    def _strength(self, strength: float | None, image: Any, mask_image: Any) -> float:
        """Diffusers' defaults."""
        if strength is not None or image is None:
            return 1.0 if strength is None else strength
        if mask_image is not None:
            return 0.9999 if self.parts.xl else 1.0
        return 0.3 if self.parts.xl else 0.8

    def _latent(self, size: tuple[int, int]) -> tuple[int, int]:
        factor = self.parts.vae.shrink
        return size[0] // factor, size[1] // factor
