"""diffusers' scheduler_config.json read into prediction, schedule and sampler, and ours written as theirs."""

from typing import Any

from ldm.checkpoints.native import ModelSpec, SamplingDefaults
from ldm.config import from_dict
from ldm.diffusion.schedules import ScheduleConfig
from ldm.errors import UserError

Json = dict[str, Any]
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
BETAS = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
BETA_RANGE = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
# What the same words mean in DPM-Solver; and whose first noise is sigma alone, but for leading.
DPM_SPACINGS = {"leading": "leading_dpm", "linspace": "sgm_uniform"}
K_DIFFUSION = ("Euler", "Heun", "KDPM2", "LMS")


def sampling_from(data: Json) -> tuple[str, ScheduleConfig, SamplingDefaults]:
    """Prediction, schedule and sampler of a scheduler's config."""
    name = str(data.get("_class_name", ""))
    prediction = PREDICTIONS.get(str(data.get("prediction_type", "epsilon")))
    flow = name.startswith("FlowMatch") or data.get("use_flow_sigmas") is True
    if prediction is None or name.startswith("EDM") or flow != (prediction == "flow" or "FlowMatch" in name):
        raise UserError(f"scheduler: {name} with prediction_type {data.get('prediction_type')!r} is not known here")
    sampler = next((ours for ours, theirs in SCHEDULERS.items() if theirs == name), "dpmpp_2m")
    if flow:
        shift = data.get("flow_shift" if "flow_shift" in data else "shift", 1.0)
        values = {"kind": "flow", "shift": shift, "start": "sum", "whole_labels": not name.startswith("FlowMatch")}
        schedule = from_dict(ScheduleConfig, values, "scheduler")
        return "flow", schedule, SamplingDefaults(sampler, "flow_dpm" if schedule.whole_labels else "trailing")
    if data.get("num_train_timesteps", 1000) != 1000 or data.get("trained_betas") is not None:
        raise UserError("scheduler: it must have 1000 training steps and no betas of its own")
    betas = BETAS.get(str(data.get("beta_schedule", "linear")))
    if betas is None:
        raise UserError(f"scheduler: beta_schedule {data.get('beta_schedule')!r} is not one of {', '.join(BETAS)}")
    ends = (data.get("beta_start", 0.0001), data.get("beta_end", 0.02))
    zero = data.get("rescale_betas_zero_snr", False)
    own = betas in BETA_RANGE and tuple(ends) != BETA_RANGE[betas]
    older = name.startswith(("DDIM", "DDPM", "PNDM", "LCM"))
    said = str(data.get("timestep_spacing", "leading" if older else "linspace"))
    if said not in ("leading", "trailing", "linspace"):
        raise UserError(f"scheduler: timestep_spacing {said!r} is not known here")
    spacing = DPM_SPACINGS.get(said, said) if sampler == "dpmpp_2m" else said
    spacing = "karras" if data.get("use_karras_sigmas") else spacing
    start = "sigma" if said != "leading" and name.startswith(K_DIFFUSION) else "unit"
    values = {"betas": betas, "zero_snr": zero, "beta_range": ends if own else None, "start": start}
    schedule = from_dict(ScheduleConfig, values, "scheduler")
    # At zero terminal SNR only trailing starts from pure noise (Lin et al. 2024).
    return prediction, schedule, SamplingDefaults(sampler, "trailing" if zero else spacing)


def sampling_to(spec: ModelSpec) -> Json:
    """A scheduler's config. UserError for a schedule that diffusers' pipelines of these families cannot run."""
    schedule = spec.schedule
    theirs = {ours: name for name, ours in PREDICTIONS.items()}
    common = {"prediction_type": theirs.get(spec.prediction), "num_train_timesteps": 1000, "final_sigmas_type": "zero"}
    if schedule.kind == "flow" and spec.prediction == "flow":
        own = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": schedule.shift}
        return common | own
    betas = next((name for name, ours in BETAS.items() if ours == schedule.betas), None)
    if schedule.kind != "vp" or schedule.shift != 1 or betas is None or spec.prediction not in theirs:
        what = f"prediction {spec.prediction!r}, schedule {schedule.kind!r}, shift {schedule.shift}"
        raise UserError(f"diffusers' pipelines have no scheduler for {what}")
    start, end = schedule.beta_range or BETA_RANGE.get(schedule.betas, (0.0001, 0.02))
    theirs_of = {ours: said for said, ours in DPM_SPACINGS.items()}
    spacing = theirs_of.get(spec.defaults.schedule, spec.defaults.schedule)
    return common | {
        "_class_name": SCHEDULERS.get(spec.defaults.sampler, "DPMSolverMultistepScheduler"),
        "beta_schedule": betas,
        "beta_start": start,
        "beta_end": end,
        "rescale_betas_zero_snr": schedule.zero_snr,
        "timestep_spacing": spacing if spacing in ("leading", "trailing", "linspace") else "trailing",
        "use_karras_sigmas": spacing == "karras",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
