/* How callers find CUDA's functions: by name and by the version of CUDA whose form of them they were built for. */
#define _GNU_SOURCE
#include "cuda_call.h"

#include <dlfcn.h>
#include <string.h>

/* Every function that has several forms or whose form has a suffix: the version that brought it, newest form last. All
 * others are exported by their name. */
static const struct {
    const char *name;
    int version;
    const char *symbol;
} FORMS[] = {
    {"cuGetProcAddress", 11030, "cuGetProcAddress"},
    {"cuGetProcAddress", 12000, "cuGetProcAddress_v2"},
    {"cuDeviceGetUuid", 9020, "cuDeviceGetUuid"},
    {"cuDeviceGetUuid", 11040, "cuDeviceGetUuid_v2"},
    {"cuDeviceTotalMem", 3020, "cuDeviceTotalMem_v2"},
    {"cuDevicePrimaryCtxRelease", 11000, "cuDevicePrimaryCtxRelease_v2"},
    {"cuMemGetInfo", 3020, "cuMemGetInfo_v2"},
    {"cuMemAlloc", 3020, "cuMemAlloc_v2"},
    {"cuMemFree", 3020, "cuMemFree_v2"},
    {"cuMemsetD8", 3020, "cuMemsetD8_v2"},
    {"cuMemsetD32", 3020, "cuMemsetD32_v2"},
    {"cuMemcpyHtoD", 3020, "cuMemcpyHtoD_v2"},
    {"cuMemcpyDtoH", 3020, "cuMemcpyDtoH_v2"},
};

/* The symbol of the newest form up to that version; NULL: each form is newer. */
static const char *form_of(const char *name, int version)
{
    const char *symbol = name;
    for (size_t row = 0; row < sizeof FORMS / sizeof FORMS[0]; row++) {
        if (strcmp(FORMS[row].name, name) != 0)
            continue;
        if (symbol == name)
            symbol = NULL;
        if (FORMS[row].version <= version)
            symbol = FORMS[row].symbol;
    }
    return symbol;
}

/* A function that this library exports; NULL: it does not. */
static void *exported(const char *symbol)
{
    Dl_info self;
    if (!dladdr(FORMS, &self))
        return NULL;
    void *library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    void *found = library == NULL ? NULL : dlsym(library, symbol);
    if (library != NULL)
        dlclose(library);
    return found;
}

CUDA cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status)
{
    (void)flags; /* Which default stream: no function here has one. */
    if (name == NULL || function == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    const char *symbol = form_of(name, version);
    *function = symbol == NULL ? NULL : exported(symbol);
    if (status != NULL)
        *status = *function != NULL ? CUDA_SYMBOL_FOUND : symbol == NULL ? CUDA_SYMBOL_NEWER : CUDA_SYMBOL_NOT_FOUND;
    return *function == NULL ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

CUDA cuGetProcAddress(const char *name, void **function, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
