"""Read DICOM CT series: headers natively, compressed frames in processes, findings by series."""
