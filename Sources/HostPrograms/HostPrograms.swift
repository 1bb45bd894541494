// SPDX-License-Identifier: Apache-2.0
// The programs for all disks of a host, in one file: their Swift runtime is in it once.

internal import DmuXenArguments
internal import DmuXendArguments
internal import SystemIO

/// dmu-xend and dmu-xen.
package func main() async {
  switch ProgramName.called {
  case "dmu-xend": await DmuXendArguments.Program.main()
  case "dmu-xen": await DmuXenArguments.Program.main()
  default: ProgramName.refuse("dmu-xend", "dmu-xen")
  }
}
