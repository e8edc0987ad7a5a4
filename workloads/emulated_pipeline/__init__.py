"""The emulated accelerator as a pipeline of stages."""
