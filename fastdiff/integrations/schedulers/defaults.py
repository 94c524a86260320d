"""The settings of diffusers' scheduler classes and their defaults, and the classes that do not fit here."""

from __future__ import annotations

import math
from typing import Any

_STEPS = {"num_train_timesteps": 1000}
_BETAS = _STEPS | {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None}
_LATENT_BETAS = _BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
_SCALED_BETAS = _LATENT_BETAS | {"beta_schedule": "scaled_linear"}
_EPS = {"prediction_type": "epsilon"}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_RESCALE = {"rescale_betas_zero_snr": False}
_LEVELS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0}
_DYNAMIC = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_CLIPPED = {"lambda_min_clipped": -math.inf, "variance_type": None}
_ZERO = {"final_sigmas_type": "zero"}
_MULTISTEP = {"solver_order": 2, "lower_order_final": True}
_DPM = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
_EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0}

_DDIM = _BETAS | _CLIP | {"set_alpha_to_one": True} | _EPS | _THRESHOLD | _LEADING | _RESCALE
_DDPM = _BETAS | {"variance_type": "fixed_small"} | _CLIP | _EPS | _THRESHOLD | _LEADING | _RESCALE
_DISTILLED = (
    _SCALED_BETAS | {"original_inference_steps": 50, "clip_sample": False, "clip_sample_range": 1.0}
    | {"set_alpha_to_one": True} | _EPS | _THRESHOLD | _LEADING | {"timestep_scaling": 10.0} | _RESCALE
)  # fmt: skip
_COGVIDEO = (
    _SCALED_BETAS | _CLIP | {"set_alpha_to_one": True, "sample_max_value": 1.0, "snr_shift_scale": 3.0} | _EPS
    | _LEADING | _RESCALE
)  # fmt: skip
_LATENT_LEVELS = _LATENT_BETAS | _LEVELS | _EPS | _LINSPACE
_FLOW_MATCH = (
    _STEPS | {"shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15}
    | {"base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None}
    | _LEVELS | {"time_shift_type": "exponential"}
)  # fmt: skip

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "CogVideoXDDIMScheduler": _COGVIDEO,
    "CogVideoXDPMScheduler": _COGVIDEO,
    "DDIMInverseScheduler": _BETAS | _CLIP | {"set_alpha_to_one": True} | _EPS | _LEADING | _RESCALE,
    "PNDMScheduler": _BETAS | {"skip_prk_steps": False, "set_alpha_to_one": False} | _EPS | _LEADING,
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    "UnCLIPScheduler": _STEPS | _CLIP | _EPS
    | {"variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2"},
    "DDPMWuerstchenScheduler": {"scaler": 1.0, "s": 0.008},
    "ConsistencyDecoderScheduler": {"num_train_timesteps": 1024, "sigma_data": 0.5},
    "EulerDiscreteScheduler": _BETAS | _EPS | _LEVELS | _LINSPACE | _RESCALE | _ZERO
    | {"interpolation_type": "linear", "sigma_min": None, "sigma_max": None, "timestep_type": "discrete"},
    "EulerAncestralDiscreteScheduler": _BETAS | _EPS | _LINSPACE | _RESCALE,
    "HeunDiscreteScheduler": _LATENT_LEVELS | {"clip_sample": False, "clip_sample_range": 1.0},
    "LMSDiscreteScheduler": _BETAS | _LEVELS | _EPS | _LINSPACE,
    "KDPM2DiscreteScheduler": _LATENT_LEVELS,
    "KDPM2AncestralDiscreteScheduler": _LATENT_LEVELS,
    "DPMSolverSDEScheduler": _LATENT_LEVELS | {"noise_sampler_seed": None},
    "DPMSolverMultistepScheduler": _BETAS | _EPS | _THRESHOLD | _MULTISTEP | _DPM | _LEVELS | _FLOW | _ZERO | _CLIPPED
    | _LINSPACE | _RESCALE | _DYNAMIC | {"euler_at_final": False, "use_lu_lambdas": False},
    "DPMSolverSinglestepScheduler": _BETAS | _EPS | _THRESHOLD | _DPM | _LEVELS | _FLOW | _ZERO | _CLIPPED | _DYNAMIC
    | {"solver_order": 2, "lower_order_final": False},
    "DPMSolverMultistepInverseScheduler": _BETAS | _EPS | _THRESHOLD | _MULTISTEP | _DPM | _LEVELS | _FLOW | _CLIPPED
    | _LINSPACE | {"euler_at_final": False},
    "DEISMultistepScheduler": _BETAS | _EPS | _THRESHOLD | _MULTISTEP | _LEVELS | _FLOW | _LINSPACE | _DYNAMIC
    | {"algorithm_type": "deis", "solver_type": "logrho"},
    "UniPCMultistepScheduler": _BETAS | _EPS | _THRESHOLD | _MULTISTEP | _LEVELS | _FLOW | _LINSPACE | _ZERO
    | _RESCALE | _DYNAMIC | {"predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None}
    | {"sigma_min": None, "sigma_max": None, "shift_terminal": None},
    "SASolverScheduler": _BETAS | _EPS | _THRESHOLD | _LEVELS | _FLOW | _CLIPPED | _LINSPACE
    | {"predictor_order": 2, "corrector_order": 2, "tau_func": None, "algorithm_type": "data_prediction"}
    | {"lower_order_final": True},
    "IPNDMScheduler": _STEPS | {"trained_betas": None},
    "EDMEulerScheduler": _STEPS | _EDM | _EPS | _ZERO,
    "EDMDPMSolverMultistepScheduler": _STEPS | _EDM | _EPS | _ZERO | _MULTISTEP | _DPM | _THRESHOLD
    | {"euler_at_final": False},
    "CosineDPMSolverMultistepScheduler": _STEPS | _EDM | _ZERO | _MULTISTEP
    | {"sigma_min": 0.3, "sigma_max": 500, "sigma_data": 1.0, "sigma_schedule": "exponential"}
    | {"prediction_type": "v_prediction", "solver_type": "midpoint", "euler_at_final": False},
    "CMStochasticIterativeScheduler": {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0}
    | {"sigma_data": 0.5, "s_noise": 1.0, "rho": 7.0, "clip_denoised": True},
    "SCMScheduler": _STEPS | {"prediction_type": "trigflow", "sigma_data": 0.5},
    "FlowMatchEulerDiscreteScheduler": _FLOW_MATCH | {"stochastic_sampling": False},
    "FlowMatchLCMScheduler": _FLOW_MATCH | {"scale_factors": None, "upscale_mode": "bicubic"},
    "FlowMatchHeunDiscreteScheduler": _STEPS | {"shift": 1.0},
    "FlowMapEulerDiscreteScheduler": _STEPS | {"shift": 1.0},
    "LTXEulerAncestralRFScheduler": _STEPS | {"eta": 1.0, "s_noise": 1.0},
    "MiniMaxH3Scheduler": {"shift": 12.0},
}  # fmt: skip

_TOKENS = "it samples tokens, not images in continuous space"
_PYRAMID = "it changes the size of a video between its stages; a step table keeps one shape"
REFUSED: dict[str, str] = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "HeliosScheduler": _PYRAMID,
    "HeliosDMDScheduler": _PYRAMID,
    "RFD4ProteinaScheduler": "it samples protein backbones, not images",
    "PiflowScheduler": "its network gives a policy that is integrated between calls, not one estimate",
    "RePaintScheduler": "its steps take an image and a mask, and go back up in noise",
    "KarrasVeScheduler": "its pipeline adds noise before each call; use fastdiff's 'heun' on the 'edm' path",
    "ScoreSdeVeScheduler": "the length of its Langevin steps depends on the norm of the network's output; "
    "use fastdiff's 'predictor_corrector' on the 've' path",
    "ScoreSdeVpScheduler": "it has no step() and its pipeline is gone; use fastdiff's 'euler_maruyama' on 'vp_sde'",
}

# settings that only classes refused above have; diffusers carries settings from one class's file to another's
_ELSEWHERE = {
    "alpha_cum_end", "alpha_cum_start", "block_length", "corrector_k", "corrector_selection",
    "corrector_selection_tau", "corrector_steps", "editing_threshold", "entropy_bound", "gamma", "gamma_cum_end",
    "gamma_cum_start", "mask_token_id", "masking_schedule", "minimal_topk", "noise_mode", "num_inference_steps",
    "num_policy_substeps", "num_vec_classes", "n_grid", "eps", "final_step_size_scale", "s_churn", "s_max", "s_min",
    "sampling_eps", "schedule_mode", "scheduler_type", "snr", "correct_steps", "stage_range", "stages", "t_lim_ode",
    "t_lim_ode_below", "t_max", "t_min", "tail_step_multiplier", "tail_steps", "threshold", "tsr_k", "tsr_sigma",
    "beta_min", "beta_max",
}  # fmt: skip
KNOWN = frozenset(_ELSEWHERE.union(*DEFAULTS.values()))
