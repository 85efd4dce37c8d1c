"""flux-local: a local inference server for FLUX.1 Krea [dev] that speaks the OpenAI Images API."""

__version__ = "0.1.0"
