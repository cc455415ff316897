/* The driver's words for NVML's codes. */
#ifndef ERRORS_H
#define ERRORS_H

const char *nvml_error(int code);

#endif
