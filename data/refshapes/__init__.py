"""RefShapes: generated images of shapes with referring expressions, in RefCOCO's file format."""
