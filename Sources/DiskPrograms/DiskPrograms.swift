// SPDX-License-Identifier: Apache-2.0
// The programs for images and for one disk, in one file: their Swift runtime is in it once.

internal import CowdArguments
internal import DmuImgArguments
internal import DscowToolArguments
internal import SystemIO

/// cowd, dmu-img and dscow_tool.
package func main() {
  switch ProgramName.called {
  case "cowd": CowdArguments.Program.main()
  case "dmu-img": DmuImgArguments.Program.main()
  case "dscow_tool": DscowToolArguments.Program.main()
  default: ProgramName.refuse("cowd", "dmu-img", "dscow_tool")
  }
}
