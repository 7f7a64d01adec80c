// Whether a dict is as it was, without looking at what it holds: versions, which CPython has up to 3.13, or changes that are counted.
#pragma once
#include "plan/python.h"

#if PY_VERSION_HEX >= 0x030E0000 && !defined(FASTOPT_WATCH_DICTS)
#define FASTOPT_WATCH_DICTS
#endif
#ifdef FASTOPT_WATCH_DICTS
#include <unordered_map>
#endif

namespace fastopt {

enum class DictOf { group, state };               // what a dict belongs to; changes of the two are counted apart

#ifndef FASTOPT_WATCH_DICTS

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
// A number that no other dict has or had and that changes when the dict does.
inline uint64_t version_of(PyObject* dict, DictOf) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
inline bool has_version(PyObject* dict, uint64_t version) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag == version; }
#pragma GCC diagnostic pop

// How often dicts of states changed so far: while it is the same, each has its version. Not counted here; 0 is equal to no count.
inline uint64_t state_changes() { return 0; }

#else

// CPython tells before a watched dict changes or dies. Its versions are kept here, by address.
class Watch {
 public:
  static uint64_t version_of(PyObject* dict, DictOf kind) {
    if (id() < 0) return 0;                       // all watchers are taken: no version is equal to another
    const auto [at, is_new] = versions().try_emplace(dict, Version{0, kind});
    if (is_new) {
      if (PyDict_Watch(id(), dict)) return PyErr_Clear(), versions().erase(dict), 0;
      at->second.number = ++count;
    }
    return at->second.number;
  }
  static bool has_version(PyObject* dict, uint64_t version) {
    const auto at = versions().find(dict);
    return version && at != versions().end() && at->second.number == version;
  }
  inline static uint64_t state_changes = 1;

 private:
  struct Version { uint64_t number; DictOf kind; };
  static std::unordered_map<PyObject*, Version>& versions() {
    static auto* const all = new std::unordered_map<PyObject*, Version>();   // dicts die later than static objects
    return *all;
  }
  static int id() {
    static const int made = [] {
      const int watcher = PyDict_AddWatcher(&changed);
      if (watcher < 0) PyErr_Clear();
      return watcher;
    }();
    return made;
  }
  static int changed(PyDict_WatchEvent event, PyObject* dict, PyObject*, PyObject*) {
    const auto at = versions().find(dict);
    if (at == versions().end()) return 0;
    at->second.number = ++count;
    state_changes += at->second.kind == DictOf::state;
    if (event == PyDict_EVENT_DEALLOCATED) versions().erase(at);
    return 0;
  }
  inline static uint64_t count = 0;
};
inline uint64_t version_of(PyObject* dict, DictOf kind) { return Watch::version_of(dict, kind); }
inline bool has_version(PyObject* dict, uint64_t version) { return Watch::has_version(dict, version); }
inline uint64_t state_changes() { return Watch::state_changes; }

#endif

}  // namespace fastopt
