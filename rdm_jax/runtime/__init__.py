"""What every room stands on: errors, files, the console, signals, devices and processes."""
