// What the files of the bindings have of each other.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "experts.h"

// The level of that name, or, of none, the one of this process. ValueError where this CPU does not run it.
const moestro::Level& level_of(const std::string& given);

void bind_checksum(nanobind::module_& m);
void bind_repack(nanobind::module_& m);
void bind_solver(nanobind::module_& m);
