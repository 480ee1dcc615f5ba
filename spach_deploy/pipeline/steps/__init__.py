"""The steps of an export: functions from typed artifacts to one typed artifact."""
