// SPDX-License-Identifier: Apache-2.0
// The programs for all disks of a host, in one file: their Swift runtime is in it once.

internal import DmuXenArguments
internal import DmuXendArguments
internal import DmuXlArguments
internal import SystemIO

/// dmu-xend, dmu-xen and dmu-xl.
package func main() async {
  switch ProgramName.called {
  case "dmu-xend": await DmuXendArguments.Program.main()
  case "dmu-xen": await DmuXenArguments.Program.main()
  case "dmu-xl": DmuXlArguments.Program.main()
  default: ProgramName.refuse("dmu-xend", "dmu-xen", "dmu-xl")
  }
}
