"""What every layer may use: errors, settings, devices, logging, and files that are whole or absent."""
