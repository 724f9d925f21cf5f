"""Wing 3: schedule, denoiser, tokenizer, sampler and training of the diffusion model."""
