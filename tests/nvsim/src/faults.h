/* Calls that are made to fail or to come late. */
#ifndef FAULTS_H
#define FAULTS_H

#include "state.h"

/* What a call is about; -1: it is not known, or about none. */
struct subject {
    int gpu, gpu_instance;
};

/* The first fault that matches the call; NULL: none. */
struct fault *fault_due(struct node *node, const char *symbol, struct subject subject);
/* Let it have its way: sleep as long as it says, and say what it wants returned. The node must not be held. */
uint32_t suffer(const char *symbol, struct subject subject);

#endif
