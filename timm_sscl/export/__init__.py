"""What leaves: a spiking model for int8 inference on a CPU."""
from .deployment import DeployReport, deploy
from .int8 import int8_missing

__all__ = ['DeployReport', 'deploy', 'int8_missing']
