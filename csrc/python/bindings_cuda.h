// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <pybind11/pybind11.h>

void bind_cuda(pybind11::module_& m);
