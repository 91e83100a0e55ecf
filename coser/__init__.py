"""CoSER: a sentence becomes a dense ring of consistent views, and the views become a 3D asset."""

__version__ = "0.1.0"
