"""Calibration: whether predictions of probability p come true in a share p of the cases."""

from softjax.calibration._bins import ReliabilityDiagram as ReliabilityDiagram
from softjax.calibration._bins import classwise_calibration_error as classwise_calibration_error
from softjax.calibration._bins import expected_calibration_error as expected_calibration_error
from softjax.calibration._bins import reliability_diagram as reliability_diagram
from softjax.calibration._temperature import calibrate_temperature as calibrate_temperature
from softjax.calibration._vector import VectorScaling as VectorScaling
from softjax.calibration._vector import calibrate_vector as calibrate_vector

__all__ = [
    "ReliabilityDiagram",
    "VectorScaling",
    "calibrate_temperature",
    "calibrate_vector",
    "classwise_calibration_error",
    "expected_calibration_error",
    "reliability_diagram",
]
