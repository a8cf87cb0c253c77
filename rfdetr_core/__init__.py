"""RF-DETR for retraining pipelines: the shared package of every stage.

Importing it costs nothing: torch is loaded by the first class or function that needs it.
"""

__version__ = "0.1.0"
