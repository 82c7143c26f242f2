"""Weight formats: how a quantized tensor is stored, and how to get its values back."""
