// All of the plan, compiled as one: by itself, each of these files takes as long as they do together, for torch's headers.
#include "plan/after_backward.cpp"
#include "plan/bind.cpp"
#include "plan/options.cpp"
#include "plan/plan.cpp"
#include "plan/walk.cpp"
#include "plan/walk_param.cpp"
