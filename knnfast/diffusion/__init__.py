"""The diffusion model: schedule, denoiser, tokenizer, sampler and training."""
