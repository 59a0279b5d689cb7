"""What leaves: a spiking model as an ONNX file, as a NIR graph, for int8 inference on a CPU, or for the hub."""
from .deployment import DeployReport, deploy
from .hub import model_card, save_for_hub
from .int8 import int8_missing
from .nir_graph import to_nir
from .nir_network import NIRNetwork, from_nir
from .onnx_file import OnnxReport, to_onnx

__all__ = [
    'DeployReport', 'NIRNetwork', 'OnnxReport', 'deploy', 'from_nir', 'int8_missing', 'model_card', 'save_for_hub',
    'to_nir', 'to_onnx']
